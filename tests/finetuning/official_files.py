"""The 37 published fine-tuning configurations as facts: by name what each of them holds, made of
what they share.
"""

from __future__ import annotations

from typing import Any

Values = dict[str, Any]

MODEL: Values = {
    "use_beit_v2": True, "vision_config": "configs/model/config_beit2_base.json", "image_res": 384, "patch_size": 16,
    "local_attn_depth": -1, "text_encoder": "../data/roberta-base", "text_num_hidden_layers": 12,
    "text_fusion_start_at": 12, "fusion_num_hidden_layers": 12, "fusion_fusion_start_at": 0,
}  # fmt: skip
DATA = "../data/finetune"


def trained(lr: str, epochs: int) -> Values:
    # YAML 1.1 reads 3e-5 as text.
    return {
        "optimizer": {"opt": "adamW", "lr": lr, "weight_decay": 0.01, "lr_mult": 2},
        "schedular": {"sched": "linear", "lr": lr, "epochs": epochs, "num_warmup_steps": 0.1},
    }


def retrieval(name: str, images: str, lr: str, *, accumulated: int = 1, **changed: Any) -> Values:
    files: Values = {f"{split}_file": f"{DATA}/{name}_{split}.json" for split in ("val", "test")}
    files |= {
        "train_file": [f"{DATA}/{name}_train.json"],
        "image_root": images,
        "accumulation_steps": accumulated,
    }
    sizes = {
        "batch_size_train": 32,
        "batch_size_test": 64,
        "batch_size_test_text": 64,
        "max_tokens": 40,
    }
    return MODEL | trained(lr, changed.pop("epochs", 20)) | files | sizes | {
        "embed_dim": 256, "temp": 0.07, "k_test": 256,
    } | changed  # fmt: skip


ZERO: Values = {"image_res": 224, "epochs": 0}
VQA = MODEL | trained("2e-5", 10) | {
    "train_file": [f"{DATA}/{name}.json" for name in ("vqa_train", "vqa_val", "vg_qa")],
    "test_file": [f"{DATA}/vqa_test.json"], "answer_list": f"{DATA}/answer_list.json",
    "vqa_root": "../images/coco/", "vg_root": "../images/visualgenome/", "image_res": 480, "num_dec_layers": 12,
    "decoder_fusion_start_at": 0, "batch_size_train": 24, "batch_size_test": 32, "max_tokens": 40, "k_test": 128,
    "accumulation_steps": 1, "start_eval": 2,
}  # fmt: skip
NLVR = MODEL | trained("1e-5", 15) | {
    "train_file": [f"{DATA}/nlvr_train.json"], "val_file": [f"{DATA}/nlvr_dev.json"],
    "test_file": [f"{DATA}/nlvr_test.json"], "image_root": "../images/nlvr2/", "batch_size": 8,
}  # fmt: skip
DETECTED: Values = {
    "refcoco_data": f"{DATA}/", "det_file": f"{DATA}/refcoco+/dets.json", "coco_file": f"{DATA}/refcoco+/cocos.json",
    "image_root": "../images/coco/",
}  # fmt: skip
GROUNDING = MODEL | DETECTED | trained("2e-5", 15) | {
    "train_file": [f"{DATA}/refcoco+_train.json"],
    "test_file": [f"{DATA}/refcoco+_val.json", f"{DATA}/refcoco+_test.json"],
    "careful_hflip": True, "batch_size": 20, "max_tokens": 40,
}  # fmt: skip
KARPATHY = f"{DATA}/coco_karpathy/coco_karpathy"
CAPTIONING = MODEL | trained("1e-5", 5) | {
    "train_file": [f"{KARPATHY}_train.json"], "val_file": f"{KARPATHY}_val.json", "test_file": f"{KARPATHY}_test.json",
    "val_gt_file": f"{KARPATHY}_val_gt.json", "test_gt_file": f"{KARPATHY}_test_gt.json",
    "image_root": "../images/coco/", "batch_size_train": 32, "batch_size_test": 32, "max_tokens": 40,
    "label_smoothing": 0.1, "max_length": 20, "min_length": 5, "num_beams": 3, "prompt": "a picture of ",
    "start_eval": 0,
}  # fmt: skip
# The two files of domain pretraining list no data.
DOMAIN: Values = MODEL | trained("3e-5", 2) | {
    "image_res": 224, "max_words": 40, "max_tokens": 40, "mask_whole_word": True, "mask_prob": 0.25, "max_masks": 8,
    "skipgram_prb": 0.2, "skipgram_size": 3,
    "accelerator": {
        "ACCELERATOR": "ApexDDP", "AUTO_CAST": False, "SYNCBN": False, "FP16_OPT_LEVEL": "O1",
        "FP16_LOSS_SCALE": "dynamic", "RNG_SEED": 42, "GRAD_ACCUMULATE_STEPS": 1, "CLIP_GRAD_NORM": 1.0,
    },
}  # fmt: skip
REGIONS = DOMAIN | DETECTED | {
    "train_file_regions": [], "train_dataset_size": 318547, "calc_image_bbox_loss": False,
    "regions": {
        "image_key": "binary", "is_image_rpath": False, "caption_key": "caption", "tokenized": True,
        "careful_hflip": True, "iter_perc": 1.0, "batch_size": 64, "max_images": 28, "max_regions": 5,
        "min_perc_in_image": 0.5, "num_workers": 4,
    },
}  # fmt: skip
PAIRS = DOMAIN | {
    "train_file": [], "train_dataset_size": 5114489, "embed_dim": 256,
    "images": {
        "image_key": "binary", "is_image_rpath": False, "caption_key": "desc", "tokenized": False, "batch_size": 128,
        "num_workers": 4,
    },
}  # fmt: skip


def glue(name: str, lr: str, epochs: int, batch: int = 32) -> Values:
    return MODEL | {
        "train_file": None, "validation_file": None, "test_file": None, "glue_datasets": "../glue/glue_datasets",
        "task_name": name, "num_labels": 3, "max_length": 128, "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": 8, "learning_rate": lr, "weight_decay": 0.0, "num_train_epochs": epochs,
        "max_train_steps": None, "pad_to_max_length": False, "use_slow_tokenizer": False,
        "gradient_accumulation_steps": 1, "num_warmup_steps": 0, "seed": 42, "lr_scheduler_type": "linear",
        "output_dir": None, "checkpoint": None, "ckpt_frequent": 5, "fusion_num_hidden_layers": 0,
        "use_huggingface_models": False, "model_name_or_path": "bert-base-cased",
    } | ({"use_xbrain": True} if name == "mnli" else {})  # fmt: skip


def images(
    name: str, folder: str, lr: str = "2e-5", batch: int = 256, *, least: str | int = 0, epochs: int = 100,
    smoothing: float = 0.1, batch_test: int = 512, probe: bool = True,
) -> Values:  # fmt: skip
    return MODEL | {
        "task_name": name, "dataset": f"../images/{folder}", "image_res": 224, "text_num_hidden_layers": 0,
        "text_fusion_start_at": 0, "fusion_num_hidden_layers": 0, "batch_size_train": batch,
        "batch_size_test": batch_test, "num_readers": 4, "mixup": 0.8, "cutmix": 1.0, "cutmix_minmax": None,
        "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "batch", "smoothing": smoothing, "num_labels": 1000,
        "color_jitter": None, "aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "remode": "pixel", "recount": 1,
        "optimizer": {"opt": "adamW", "lr": lr, "weight_decay": 0.02, "momentum": 0.9},
        "schedular": {"lr": lr, "min_lr": least, "epochs": epochs, "warmup_epochs": 10},
    } | ({"is_lp": True} if probe else {})  # fmt: skip


SETS: dict[str, Values] = {
    "Country211_lp": images("country211", "country211", "4e-5", least="1e-7"),
    "caltech101_lp": images("caltech101", "", smoothing=0.0),
    "dtd_lp": images("dtd", "dtd", batch=512),
    "fer2013": images("fer2013", "fer2013", smoothing=0.0, batch_test=128),
    "flowers102_lp": images("flowers102", "flowers102", "1e-4", 512, smoothing=0.0),
    "gtsrb_lp": images("gtsrb", "gtsrb", smoothing=0.0),
    "pcam_lp": images("pcam", "pcam", "5e-6", 2048, smoothing=0.0),
    "renderedsst2": images("renderedsst2", "renderedsst2", "1e-4", 1024, smoothing=0.0),
    "stanfordcars_lp": images("stanfordcars", "stanfordcars", "4e-5", least="1e-7", smoothing=0.0),
    "stl10_lp": images("stl10", "stl10", epochs=200, smoothing=0.0),
    "sun397_lp": images("sun397", "sun397", "4e-5", least="1e-7", smoothing=0.0),
} | {
    f"{name}_lp": images(name, name)
    for name in ("cifar10", "cifar100", "fgvcaircraft", "food101", "mnist", "oxfordiiitpet")
}  # fmt: skip
FILES: dict[str, Values] = SETS | {
    "Captioning": CAPTIONING,
    "Captioning_pretrain_O1": PAIRS,
    "Grounding_bbox": GROUNDING,
    "Grounding_bbox_pretrain_O1": REGIONS,
    "NLVR": NLVR,
    "Retrieval_coco": retrieval("coco", "../images/coco/", "3e-5"),
    "Retrieval_coco_zero": retrieval("coco", "../images/coco/", "3e-5", **ZERO),
    "Retrieval_flickr": retrieval("flickr30k", "../images/", "1e-5"),
    "Retrieval_flickr_zero": retrieval("flickr30k", "../images/", "3e-5", accumulated=4, **ZERO),
    "VQA": VQA,
    "glue_cola": glue("cola", "3e-5", 20),
    "glue_mnli": glue("mnli", "2e-5", 5),
    "glue_mrpc": glue("mrpc", "5e-5", 20),
    "glue_qnli": glue("qnli", "2e-5", 3),
    "glue_qqp": glue("qqp", "2e-5", 5),
    "glue_rte": glue("rte", "1e-5", 20, 16),
    "glue_sst2": glue("sst2", "2e-5", 3),
    "glue_stsb": glue("stsb", "5e-5", 20),
    "imagenet1k": images("imagenet", "imagenet", "4e-5", 128, least="1e-7", probe=False),
    "imagenet1k_lp": images("imagenet", "imagenet", "4e-5", least="1e-7"),
}
