"""PCInfer on several processes."""

from torch2pc.distributed.pcinfer import PCInfer

__all__ = ["PCInfer"]
