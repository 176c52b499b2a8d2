"""The systems, one file each, built from the library's layers."""

from pyflowgen.models.glow import Glow as Glow
from pyflowgen.models.nice import NICE as NICE
from pyflowgen.models.nsf import NSF as NSF
from pyflowgen.models.realnvp import RealNVP as RealNVP
