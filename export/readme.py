"""`README.md` of an export: its files, how to open it, and how to build engines without this project."""

from __future__ import annotations

from .manifest import GraphRecord, Manifest

README_FILE = "README.md"


def readme(manifest: Manifest) -> str:
    """The text of `README.md` for a complete manifest."""
    side = manifest.xfm_config.image_size
    session = 'session = Session.load("this folder")'
    inputs = 'inputs = session.processor(images=["photo.jpg"], text=["a caption"])'
    parts = [
        f"# X-FM as {manifest.kind}",
        f"Weights of {manifest.source}, {manifest.dtype}, by xfm-fast {manifest.xfm_fast}.",
        "`manifest.json` has the sizes, and whether the files agree with the model.",
        f"Images of {side}x{side} pixels are prepared as `preprocessor_config.json` says.",
        "Texts are by `tokenizer.json`, where the model had one.",
        f"```python\nfrom xfm_fast.export import Session\n\n{session}\n{inputs}\n```",
        "\n".join(["| graph | file | inputs | outputs |", "|---|---|---|---|", *map(_row, manifest.graphs)]),
    ]
    if manifest.kind == "onnx":
        typed = "" if manifest.dtype == "fp32" else " --stronglyTyped"
        lines = "\n".join(_trtexec(record, manifest.packed) + typed for record in manifest.graphs)
        parts.append(f"## TensorRT engines without xfm-fast\n\n```sh\n{lines}\n```")
    return "\n\n".join(parts) + "\n"


def _row(record: GraphRecord) -> str:
    sides = ("<br>".join(f"{each.name} {each.dims}" for each in side) for side in (record.inputs, record.outputs))
    return f"| {record.name} | {record.file} | {' | '.join(sides)} |"


def _trtexec(record: GraphRecord, packed: bool) -> str:
    """The `trtexec` command of a graph for the sizes of the last default profile."""
    from .engines.profiles import parse_profiles

    axes = parse_profiles((), packed=packed)[-1].axes
    options = [f"trtexec --onnx={record.file} --saveEngine={record.name}.engine --noTF32"]
    for name, chosen in (("min", "least"), ("opt", "best"), ("max", "most")) if record.axes else ():
        # A model may accept less than the profile has.
        sizes = {
            axis: min(getattr(axes[axis], chosen), has.most or axes[axis].most) for axis, has in record.axes.items()
        }
        shapes = (
            f"{tensor.name}:{'x'.join(str(sizes[dim] if isinstance(dim, str) else dim) for dim in tensor.dims)}"
            for tensor in record.inputs
        )
        options.append(f"--{name}Shapes={','.join(shapes)}")
    return " ".join(options)
