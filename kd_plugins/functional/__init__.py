"""The losses as pure functions: tensors in, a tensor out; no state and no modules.

Differences are computed in float32 whatever the inputs and the autocast (float64 stays float64). `reduction="mean"` is
the mean over the examples of the batch, `"sum"` their sum, `"none"` one value for each example `[B]`. A ValueError says
what is wrong with the inputs.
"""

from kd_plugins.functional.adversarial import lsgan_classes, lsgan_discriminator, lsgan_generator, wgan_gp
from kd_plugins.functional.at import at
from kd_plugins.functional.crd import crd, crd_log_z
from kd_plugins.functional.dfa import aggregate
from kd_plugins.functional.internal import attention_kl, cls_cosine
from kd_plugins.functional.kd import kd, kd_multilabel
from kd_plugins.functional.nst import match_spatial, nst
from kd_plugins.functional.quest import match_sharpness, quest, soft_assignment
from kd_plugins.functional.reviewkd import hcl
from kd_plugins.functional.similarity import feature_l1, feature_l2, linear_cka
from kd_plugins.functional.vid import vid

__all__ = [
    "aggregate",
    "at",
    "attention_kl",
    "cls_cosine",
    "crd",
    "crd_log_z",
    "feature_l1",
    "feature_l2",
    "hcl",
    "kd",
    "kd_multilabel",
    "linear_cka",
    "lsgan_classes",
    "lsgan_discriminator",
    "lsgan_generator",
    "match_sharpness",
    "match_spatial",
    "nst",
    "quest",
    "soft_assignment",
    "vid",
    "wgan_gp",
]
