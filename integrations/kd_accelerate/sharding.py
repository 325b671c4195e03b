"""Students whose weights lie in parts on several processes: what fits them, and what they need."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule

from kd_plugins import Distiller, DistillError, Nets
from kd_plugins.binding import needs_of_stages


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the student is sharded, by FSDP2 or DeepSpeed.

    Raises:
        DistillError: It is sharded by what has no weights of the student's own shapes: FSDP1, Megatron-LM.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.MEGATRON_LM or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        name = "Megatron-LM" if kind == DistributedType.MEGATRON_LM else "FSDP1"
        raise DistillError(
            f"Expected a student that keeps its modules, got {name}, which replaces them, so that taps find nothing:"
            " use FSDP2 (fsdp_version 2), DeepSpeed ZeRO or DDP."
        )
    return kind in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def make_whole(network: nn.Module) -> None:
    """Puts a network together again that `deepspeed.zero.Init` has cut into parts, in every process.

    transformers' `from_pretrained` makes every network so once there are `TrainingArguments` of ZeRO-3, and until
    DeepSpeed has the student for its training, and of teachers ever, nobody gathers the weights for a forward.
    """
    cut = [(m, name, p) for m in network.modules() for name, p in m._parameters.items() if hasattr(p, "ds_id")]
    if not cut:
        return
    with import_module("deepspeed").zero.GatheredParameters([p for *_, p in cut]):
        whole = {p.ds_id: nn.Parameter(p.detach().clone(), p.requires_grad) for *_, p in cut}
    for module, name, p in cut:
        module._parameters[name] = whole[p.ds_id]


def check_sharded(distiller: Distiller, nets: Nets, *, zero: int = 0, scaled: bool = False) -> None:
    """Refuses methods that need the student's weights as they are between its forward and its own backward.

    Args:
        distiller: The method.
        nets: The networks.
        zero: DeepSpeed's stage; 3 frees the weights after the forward.
        scaled: Whether DeepSpeed scales the loss by itself (fp16), of which only its own optimizer knows.
    """
    stages = distiller.stages()
    inside = zero == 3 and any(n.student.taps and not n.student.logits for n in needs_of_stages(distiller))
    own = any(p.requires_grad for p in distiller.parameters())
    reasons = {
        "moves weights of the student in a turn beside its own": any(distiller.shared(nets).values()),
        "has a stage that begins with the student's first weights anew": any(s.fresh_student for s in stages),
        "has a stage that leaves the student alone": any(s.ends_with != "student" for s in stages),
        "trains peers, which nobody shards": len(nets.peers) > 1,
        "has a phase whose backward begins inside a layer, where ZeRO-3 has freed the weights (ZeRO-2 has not)": inside,
        "trains parts of its own, whose gradients DeepSpeed's fp16 leaves scaled (bf16 does not)": scaled and own,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), "")
    if reason:
        raise DistillError(
            f"Expected a method that a sharded student fits (FSDP, DeepSpeed), got {distiller.name}, which {reason}:"
            " use DDP (torchrun, accelerate launch), or another method."
        )


def gather_for_taps(distiller: Distiller, nets: Nets) -> None:
    """Lets every forward run to its end, and keeps weights for a backward that begins inside a layer."""
    for net in nets:
        sharded = isinstance(net.module, FSDPModule)
        net.network.whole = net is nets.student or sharded
        if net is nets.student and sharded and any(needs.student.taps for needs in needs_of_stages(distiller)):
            # Weights that are freed after the forward come back when a gradient passes the output of their layer.
            net.module.set_reshard_after_forward(False)


def check_reached(distiller: Distiller, student: Sequence[nn.Parameter]) -> None:
    """Refuses a step whose backward never passed an output of a sharded module, so that no gradient was reduced."""
    if student and all(p.grad is None for p in student):
        raise DistillError(
            f"No gradient of {distiller.name} has reached the sharded student: shard its layers, too"
            " (fsdp_transformer_layer_cls_to_wrap), as what is read lies inside the only sharded module."
        )
