"""The systems, one file each, built from the library's layers."""

from pyflowgen.models.detector import Detector as Detector
from pyflowgen.models.detector import GRUDetector as GRUDetector
from pyflowgen.models.detector import LiveStreams as LiveStreams
from pyflowgen.models.detector import LSTMDetector as LSTMDetector
from pyflowgen.models.glow import Glow as Glow
from pyflowgen.models.idn import IDN as IDN
from pyflowgen.models.nice import NICE as NICE
from pyflowgen.models.nsf import NSF as NSF
from pyflowgen.models.realnvp import RealNVP as RealNVP
from pyflowgen.models.trn import TRN as TRN
