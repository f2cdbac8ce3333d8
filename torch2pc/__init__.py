"""torch2pc: train any ``nn.Sequential``, or any graph of layers, by predictive coding.

This file is the table of contents: it lists the public names and nothing else.
"""

from torch2pc import energies, steps
from torch2pc.cutting.graph import pc_graph
from torch2pc.cutting.grouping import group_layers
from torch2pc.displacement.recorder import displacement_rule
from torch2pc.follow.follow import follow, follow_latent
from torch2pc.follow.record import Record
from torch2pc.fwd_pass_plus import FwdPassPlus
from torch2pc.graph.nodes import PCGraph
from torch2pc.latent import PCInferLatent
from torch2pc.memory import PCRNN
from torch2pc.pcinfer import EquilibriumResult, PCInfer, PCResult

__version__ = "0.1.0"

__all__ = [
    "PCRNN",
    "EquilibriumResult",
    "FwdPassPlus",
    "PCGraph",
    "PCInfer",
    "PCInferLatent",
    "PCResult",
    "Record",
    "displacement_rule",
    "energies",
    "follow",
    "follow_latent",
    "group_layers",
    "pc_graph",
    "steps",
]
