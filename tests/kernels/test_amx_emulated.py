"""Machine code for AMX in an emulated Sapphire Rapids: Bochs boots from a disk that holds a kernel and its operands.

Debian's packages `bochs` and `bochs-term`, and `binutils`, are needed. Bochs 3.0 has two faults: it reads the signed
bytes of `tdpbusd` as unsigned ones, so weights in bytes are positive here, and it repeats the lower half of
`vcvtne2ps2bf16`, so no weight is rounded here.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.accuracy import assert_as_accurate
from tests.kernels.cases import plain_attention
from tests.kernels.test_llvm import linear
from xfm_fast.kernels.cpu import llvm, workspace

if missing := [name for name in ("bochs-bin", "as", "ld", "script") if shutil.which(name) is None]:
    pytest.skip(f"not installed: {', '.join(missing)}", allow_module_level=True)
if (reason := llvm.why_not(torch.bfloat16)) is not None:
    pytest.skip(reason, allow_module_level=True)

import llvmlite.binding

from xfm_fast.kernels.cpu.llvm import attention as attention_module
from xfm_fast.kernels.cpu.llvm import builder
from xfm_fast.kernels.cpu.llvm import linear as linear_module

# Addresses in the machine: of code, operands and scratch memory. A disk's sectors are read below the last 64 KiB.
CODE, DATA, SCRATCH, CHUNKS = 0x10000, 0x30000, 0x400000, 15
CYLINDERS, HEADS, TRACK = 16, 16, 63
LIMIT = 128 << 10

# Reads 64 sectors at a time, enters 64-bit mode with the first GiB in place, and enables vectors and tiles.
BOOT = """
.code16
    cli
    xor %ax, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov $0x7c00, %sp
    in $0x92, %al
    or $2, %al
    out %al, $0x92
    mov $0x80, %dl
    mov $CHUNKS, %cx
read:
    push %cx
    mov $0x42, %ah
    mov $packet, %si
    int $0x13
    jc stop
    addw $0x800, packet + 6
    addl $64, packet + 8
    pop %cx
    loop read
    cli
    mov $0x1000, %edi
    mov %edi, %cr3
    xor %eax, %eax
    mov $0xc00, %ecx
    rep stosl
    movl $0x2003, 0x1000
    movl $0x3003, 0x2000
    mov $0x3000, %di
    mov $0x83, %eax
map:
    mov %eax, (%di)
    add $0x200000, %eax
    add $8, %di
    cmp $0x4000, %di
    jb map
    mov $0x40620, %eax
    mov %eax, %cr4
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    lgdt table
    mov $0x80000023, %eax
    mov %eax, %cr0
    ljmp $8, $long
stop:
    hlt
.align 4
packet:
    .byte 16, 0
    .word 64, 0, CODE >> 4
    .quad 1
segments:
    .quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff
table:
    .word 23
    .long segments
.code64
long:
    mov $16, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $0x7bf0, %rsp
    xor %ecx, %ecx
    xor %edx, %edx
    mov $0x600e7, %eax
    xsetbv
    mov $CODE, %eax
    jmp *%rax
.org 510
    .word 0xaa55
"""
# Fills scratch memory with NaN, calls the kernel, prints its result in hexadecimal, and switches the machine off.
START = """
.globl _start
_start:
    mov $SCRATCH, %edi
    mov $-1, %eax
    mov $0x80000, %ecx
    rep stosl
    mov $arguments, %edi
    call KERNEL
    mov $RESULT, %esi
    mov $BYTES, %ebp
next:
    mov (%rsi), %bl
    inc %rsi
    mov %bl, %al
    shr $4, %al
    call print
    mov %bl, %al
    and $15, %al
    call print
    dec %ebp
    jnz next
    mov $0x8900, %edx
    mov $message, %esi
    mov $8, %ecx
    rep outsb
    hlt
print:
    add $'0', %al
    cmp $'9', %al
    jbe put
    add $39, %al
put:
    mov $0x378, %edx
    out %al, %dx
    mov $0x37a, %edx
    mov $0x0d, %al
    out %al, %dx
    mov $0x0c, %al
    out %al, %dx
    ret
message:
    .ascii "Shutdown"
.align 64
counters:
    .fill 32, 8, 0
arguments:
    .quad TASKS, counters, counters + 128, constants, VALUES
"""
CONFIGURATION = f"""
megs: 64
cpu: model=sapphire_rapids, ips=200000000, reset_on_triple_fault=0
romimage: file=$BXSHARE/BIOS-bochs-latest
vgaromimage: file=$BXSHARE/VGABIOS-lgpl-latest
ata0-master: type=disk, path=disk, mode=flat, cylinders={CYLINDERS}, heads={HEADS}, spt={TRACK}
boot: disk
display_library: term
parport1: enabled=1, file=printed
log: log
panic: action=fatal
"""


class Launched(Exception):
    """The launch is on the disk."""


@pytest.fixture
def emulate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """A function that returns what the kernel of a module writes, instead of a result like this one."""

    def call(*command: str) -> None:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def write_disk(
        name: str, code: bytes, memory: bytes, result: int, size: int, args: list[int]
    ) -> None:
        numbers = {"SCRATCH": SCRATCH, "RESULT": result, "BYTES": size, "CODE": CODE}
        symbols = [
            f"--defsym={key}={value}" for key, value in (numbers | {"CHUNKS": CHUNKS}).items()
        ]
        tasks, *values = args
        start = START.replace("KERNEL", name).replace("TASKS", str(tasks))
        start = start.replace("VALUES", ", ".join(map(str, values)))
        (tmp_path / "kernel.o").write_bytes(code)
        for program, text in (("boot", BOOT), ("start", start)):
            (tmp_path / f"{program}.S").write_text(text)
            call("as", *symbols, f"{program}.S", "-o", f"{program}.o")
        link = ("ld", "--oformat=binary", "-zmax-page-size=64")
        call(*link, "-Ttext=0x7c00", "-e0", "boot.o", "-o", "boot")
        call(*link, f"-Ttext={CODE:#x}", "start.o", "kernel.o", "-o", "code")
        boot, program = ((tmp_path / file).read_bytes() for file in ("boot", "code"))
        assert len(program) <= DATA - CODE
        disk = boot + program.ljust(DATA - CODE, b"\0") + memory
        assert len(disk) <= 512 * (64 * CHUNKS + 1), "operands are too large"
        (tmp_path / "disk").write_bytes(disk.ljust(512 * CYLINDERS * HEADS * TRACK, b"\0"))

    def run(module: Any, launch: Callable[[], Any], tensors: list[Tensor], like: Tensor) -> Tensor:
        def kernel(emitter: Any, *options: Any) -> Any:
            def write(args: tuple[int, ...], tasks: int, threads: int) -> None:
                memory, names = bytearray(), (*module._POINTERS, *module._NUMBERS)
                values = dict(zip(names, args, strict=True))

                def put(content: bytes) -> int:
                    memory.extend(bytes(-len(memory) % 64))
                    memory.extend(content)
                    return DATA + len(memory) - len(content)

                buffers = [*tensors, *workspace._local.buffers.values()]
                storages = [tensor.untyped_storage() for tensor in buffers]
                for name in module._POINTERS:
                    address = values[name]
                    # The steps of rows belong to no tensor of the test.
                    end = address + 4 * values.get("rows", 0)
                    for storage in storages:
                        if 0 <= address - storage.data_ptr() < storage.nbytes():
                            end = storage.data_ptr() + storage.nbytes()
                    if name == "scratch":
                        values[name] = SCRATCH
                    elif name == "out":
                        values[name] = put(bytes(like.untyped_storage().nbytes()))
                    elif address:
                        values[name] = put(ctypes.string_at(address, min(end - address, LIMIT)))
                code, size = builder._compile(emitter(*options).b, llvm.AMX), like.nbytes
                arguments = [tasks, *values.values()]
                write_disk(emitter.name, code, bytes(memory), values["out"], size, arguments)
                raise Launched

            return write

        monkeypatch.setattr(module, "kernel", kernel)
        with pytest.raises(Launched):
            launch()
        # Its screen is a terminal.
        call("script", "-qc", "TERM=xterm timeout 100 bochs-bin -q -f bochsrc || true", "/dev/null")
        printed = (tmp_path / "printed").read_text(errors="replace")
        assert len(printed) == 2 * like.nbytes, (tmp_path / "log").read_text()[-3000:]
        return torch.frombuffer(bytearray.fromhex(printed), dtype=like.dtype).view(like.shape)

    llvmlite.binding.initialize_native_target()
    llvmlite.binding.initialize_native_asmprinter()
    (tmp_path / "bochsrc").write_text(CONFIGURATION)
    return run


@pytest.mark.parametrize("shape", [(33, 96, 48), (70, 544, 80), (97, 64, 304)])
def test_linear(emulate: Callable[..., Tensor], shape: tuple[int, int, int]) -> None:
    """Exactly, of small integers."""
    rows, inputs, outputs = shape
    x = torch.randint(-3, 4, (rows, inputs)).bfloat16()
    weight = torch.randint(-1, 2, (outputs, inputs)).bfloat16()
    truth = (x.double() @ weight.double().t()).bfloat16()
    launch = partial(linear_module.linear, x, weight, None, few=False, level=llvm.AMX)
    assert torch.equal(emulate(linear_module, launch, [x, weight], truth), truth)


@pytest.mark.parametrize("gelu", [False, True])
def test_epilogue(emulate: Callable[..., Tensor], gelu: bool) -> None:
    x, weight = torch.randn(70, 160).bfloat16(), torch.randn(80, 160).bfloat16()
    bias, gamma, residual = (torch.randn(*size, 80).bfloat16() for size in ((), (), (70,)))
    addends = (bias, None, None) if gelu else (bias, residual, gamma)
    launch = partial(linear_module.linear, x, weight, *addends, gelu=gelu, level=llvm.AMX)
    tensors = [x, weight, *(tensor for tensor in addends if tensor is not None)]
    result = emulate(linear_module, launch, tensors, residual)
    assert_as_accurate(result, partial(linear, gelu=gelu), x, weight, *addends)


def test_turned_weight(emulate: Callable[..., Tensor]) -> None:
    x, weight, factors = torch.randn(70, 160).bfloat16(), torch.randn(160, 80), torch.rand(160)
    options: dict[str, Any] = {"turned": True, "factors": factors, "level": llvm.AMX}
    launch = partial(linear_module.linear, x, weight, None, **options)
    result = emulate(linear_module, launch, [x, weight, factors], x.new_empty(70, 80))
    assert_as_accurate(result, torch.mm, x, (weight * factors[:, None]).bfloat16())


# Rows that every thread quantises, with a tile of them and with two; rows that another kernel does.
@pytest.mark.parametrize("shape", [(5, 64, 16), (40, 768, 48), (97, 64, 304)])
def test_int8(emulate: Callable[..., Tensor], shape: tuple[int, int, int]) -> None:
    rows, inputs, outputs = shape
    weight = torch.randint(0, 128, (outputs, inputs), dtype=torch.int8)
    panels = linear_module.int8_panels(weight, torch.rand(outputs) / 100)
    x, bias, out = torch.randn(rows, inputs), torch.randn(outputs), torch.empty(rows, outputs)
    launch = partial(linear_module.int8_linear, x, panels, bias, None, out, gelu=True)
    truth = launch(level=llvm._AVX512_BF16).clone()
    tensors = [x, bias, *panels]
    result = emulate(linear_module, partial(launch, level=llvm.AMX), tensors, out)
    assert torch.equal(result, truth)


@pytest.mark.parametrize("shape", [(13, 13, 3, 64), (33, 205, 1, 32), (100, 45, 2, 128)])
def test_attention(emulate: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    queries, keys, heads, width = shape
    q = torch.randn(1, queries, heads, width).bfloat16()
    k, v = torch.randn(1, keys, 2, heads, width).bfloat16().unbind(2)
    bias = torch.randn(1, heads, queries, keys).bfloat16().float() if keys > 13 else None
    launch = partial(attention_module.attention, q, k, v, 0.3, bias, level=llvm.AMX)
    tensors = [q, k, v, *([] if bias is None else [bias])]
    result = emulate(attention_module, launch, tensors, q)
    assert_as_accurate(
        result, plain_attention, q, k, v, 0.3, bias if bias is None else bias.bfloat16()
    )
