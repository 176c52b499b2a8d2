"""Drop-in faster PyTorch layers for generative flows and streaming action detection."""

__version__ = "0.1.0"

from pyflowgen._native import build_info as build_info
from pyflowgen._native import reference_path as reference_path
from pyflowgen.bijection import Bijection as Bijection
from pyflowgen.bijection import Chain as Chain
from pyflowgen.bijection import Inverse as Inverse
from pyflowgen.flow import DiagNormal as DiagNormal
from pyflowgen.flow import Flow as Flow
from pyflowgen.flow import FlowDistribution as FlowDistribution
from pyflowgen.flow import Logistic as Logistic
from pyflowgen.flow import LogisticDistribution as LogisticDistribution
from pyflowgen.flow import bits_per_dim as bits_per_dim
from pyflowgen.layers import ActNorm as ActNorm
from pyflowgen.layers import Dequantize as Dequantize
from pyflowgen.layers import Logit as Logit
from pyflowgen.layers import MultiScale as MultiScale
from pyflowgen.layers import Permutation as Permutation
from pyflowgen.layers import Scale as Scale
from pyflowgen.layers import Squeeze as Squeeze
from pyflowgen.nets import MLP as MLP
from pyflowgen.nets import ConvResNet as ConvResNet
from pyflowgen.ops.affine_coupling import AdditiveCoupling as AdditiveCoupling
from pyflowgen.ops.affine_coupling import AffineCoupling as AffineCoupling
from pyflowgen.ops.affine_coupling import affine_coupling as affine_coupling
from pyflowgen.ops.affine_coupling import affine_coupling_reference as affine_coupling_reference
from pyflowgen.ops.gru import GRU as GRU
from pyflowgen.ops.gru import GRUCell as GRUCell
from pyflowgen.ops.gru import gru as gru
from pyflowgen.ops.gru import gru_reference as gru_reference
from pyflowgen.ops.linear import Linear as Linear
from pyflowgen.ops.linear import linear as linear
from pyflowgen.ops.linear import linear_reference as linear_reference
from pyflowgen.ops.lstm import LSTM as LSTM
from pyflowgen.ops.lstm import LSTMCell as LSTMCell
from pyflowgen.ops.lstm import lstm as lstm
from pyflowgen.ops.lstm import lstm_reference as lstm_reference
