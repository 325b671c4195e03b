"""The losses as pure functions: tensors in, a tensor out; no state and no modules.

Differences are computed in float32 whatever the inputs and the autocast (float64 stays float64). `reduction="mean"` is
the mean over the examples of the batch, `"sum"` their sum, `"none"` one value for each example `[B]`. A ValueError says
what is wrong with the inputs.
"""

from kd_plugins.functional.adversarial import lsgan_classes, lsgan_discriminator, lsgan_generator, wgan_gp
from kd_plugins.functional.dfa import aggregate
from kd_plugins.functional.internal import attention_kl, cls_cosine
from kd_plugins.functional.kd import kd, kd_multilabel
from kd_plugins.functional.nst import match_spatial, nst
from kd_plugins.functional.quest import match_sharpness, quest, soft_assignment
from kd_plugins.functional.similarity import feature_l1, feature_l2

__all__ = [
    "aggregate",
    "attention_kl",
    "cls_cosine",
    "feature_l1",
    "feature_l2",
    "kd",
    "kd_multilabel",
    "lsgan_classes",
    "lsgan_discriminator",
    "lsgan_generator",
    "match_sharpness",
    "match_spatial",
    "nst",
    "quest",
    "soft_assignment",
    "wgan_gp",
]
