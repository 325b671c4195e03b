"""The flags of timm's train.py that kd-timm-train does not read yet, by argparse name, with timm's default."""

from __future__ import annotations

from typing import Any

__all__ = ["UNSUPPORTED"]

_NONE = """
    train_num_samples val_num_samples model_dtype device_modules start_epoch drop_connect train_img_sizes
    train_batch_sizes train_size_probs train_batches_per_epoch naflex_patch_sizes naflex_patch_size_probs
    kd_model_name distill_loss_weight task_loss_weight kd_student_feature_dim kd_teacher_feature_dim
""".split()
_OFF = """
    no_resume_opt fast_norm torchscript synchronize_step jsd_loss resplit split_bn model_ema_force_cpu save_images
    no_prefetcher use_multi_epochs_loader naflex_loader naflex_patchify_channels_first
""".split()
# Newer than the script whose defaults these are; None where the default is not known.
_NEWER = """
    task loss loss_class_weight loss_pos_weight loss_weight_power class_stats poly_epsilon poly_gamma target_format
    multilabel_threshold save_epochs stop_epoch lr_decay_fn lr_stable_timescale pretrained_cfg_overlay
""".split()

UNSUPPORTED: dict[str, Any] = {
    **dict.fromkeys([*_NONE, *_NEWER]),
    **dict.fromkeys(_OFF, False),
    "fuser": "",
    "local_rank": 0,
    "epoch_repeats": 0.0,
    "aug_repeats": 0,
    "aug_splits": 0,
    "recovery_interval": 0,
    "tta": 0,
    "train_size_schedule": "constant",
    "train_size_schedule_spread": 0.65,
    "train_size_random_mix": 0.1,
    "variable_batch_loss_scale": "none",
    "naflex_train_seq_lens": [128, 256, 576, 784, 1024],
    "naflex_max_seq_len": 576,
    "naflex_loss_scale": "linear",
    "kd_distill_type": "logit",
    "kd_loss_type": "kl",
    "kd_temperature": 4.0,
    "kd_token_distill_type": "soft",
}
