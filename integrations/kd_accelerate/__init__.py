"""What every host shares: playing a distiller's turns under an Accelerator."""

from kd_accelerate.averaging import average_buffers, average_gradients, broadcast
from kd_accelerate.player import TurnPlayer

__all__ = ["TurnPlayer", "average_buffers", "average_gradients", "broadcast"]
