"""What every host shares: playing a distiller's turns under an Accelerator."""

from kd_accelerate.player import TurnPlayer
from kd_plugins.averaging import average_buffers, average_gradients, broadcast

__all__ = ["TurnPlayer", "average_buffers", "average_gradients", "broadcast"]
