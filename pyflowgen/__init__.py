"""Drop-in faster PyTorch layers for generative flows and streaming action detection."""

__version__ = "0.1.0"

from pyflowgen._native import build_info as build_info
from pyflowgen._native import reference_path as reference_path
from pyflowgen.bases import GaussianMixture as GaussianMixture
from pyflowgen.bases import Resampled as Resampled
from pyflowgen.bijection import Bijection as Bijection
from pyflowgen.bijection import Chain as Chain
from pyflowgen.bijection import Inverse as Inverse
from pyflowgen.estimators import hutchinson_trace as hutchinson_trace
from pyflowgen.estimators import hutchpp_trace as hutchpp_trace
from pyflowgen.estimators import russian_roulette_logdet as russian_roulette_logdet
from pyflowgen.flow import DiagNormal as DiagNormal
from pyflowgen.flow import Flow as Flow
from pyflowgen.flow import FlowDistribution as FlowDistribution
from pyflowgen.flow import Logistic as Logistic
from pyflowgen.flow import LogisticDistribution as LogisticDistribution
from pyflowgen.flow import bits_per_dim as bits_per_dim
from pyflowgen.layers import ActNorm as ActNorm
from pyflowgen.layers import Dequantize as Dequantize
from pyflowgen.layers import GlowStep as GlowStep
from pyflowgen.layers import Logit as Logit
from pyflowgen.layers import MultiScale as MultiScale
from pyflowgen.layers import Permutation as Permutation
from pyflowgen.layers import Scale as Scale
from pyflowgen.layers import Squeeze as Squeeze
from pyflowgen.linear_flows import Householder as Householder
from pyflowgen.linear_flows import MatrixExponential as MatrixExponential
from pyflowgen.low_rank_flows import Planar as Planar
from pyflowgen.low_rank_flows import Radial as Radial
from pyflowgen.low_rank_flows import Sylvester as Sylvester
from pyflowgen.malloc import tune_malloc as tune_malloc
from pyflowgen.nets import MLP as MLP
from pyflowgen.nets import ConvNet as ConvNet
from pyflowgen.nets import ConvResNet as ConvResNet
from pyflowgen.nets import NormalPrior as NormalPrior
from pyflowgen.nets import ResidualMLP as ResidualMLP
from pyflowgen.nets import ZeroConv2d as ZeroConv2d
from pyflowgen.ops.affine_coupling import AdditiveCoupling as AdditiveCoupling
from pyflowgen.ops.affine_coupling import AffineCoupling as AffineCoupling
from pyflowgen.ops.affine_coupling import affine_coupling as affine_coupling
from pyflowgen.ops.affine_coupling import affine_coupling_reference as affine_coupling_reference
from pyflowgen.ops.gru import GRU as GRU
from pyflowgen.ops.gru import GRUCell as GRUCell
from pyflowgen.ops.gru import gru as gru
from pyflowgen.ops.gru import gru_reference as gru_reference
from pyflowgen.ops.idu import IDU as IDU
from pyflowgen.ops.idu import idu as idu
from pyflowgen.ops.idu import idu_reference as idu_reference
from pyflowgen.ops.invertible_linear import Invertible1x1Conv as Invertible1x1Conv
from pyflowgen.ops.invertible_linear import InvertibleLinear as InvertibleLinear
from pyflowgen.ops.invertible_linear import invertible_linear as invertible_linear
from pyflowgen.ops.invertible_linear import invertible_linear_reference as invertible_linear_reference
from pyflowgen.ops.linear import Linear as Linear
from pyflowgen.ops.linear import linear as linear
from pyflowgen.ops.linear import linear_reference as linear_reference
from pyflowgen.ops.lstm import LSTM as LSTM
from pyflowgen.ops.lstm import LSTMCell as LSTMCell
from pyflowgen.ops.lstm import lstm as lstm
from pyflowgen.ops.lstm import lstm_reference as lstm_reference
from pyflowgen.ops.mlp_coupling import mlp_coupling as mlp_coupling
from pyflowgen.ops.mlp_coupling import mlp_coupling_reference as mlp_coupling_reference
from pyflowgen.ops.rational_quadratic_spline import SplineCoupling as SplineCoupling
from pyflowgen.ops.rational_quadratic_spline import rational_quadratic_spline as rational_quadratic_spline
from pyflowgen.ops.rational_quadratic_spline import (
    rational_quadratic_spline_reference as rational_quadratic_spline_reference,
)
from pyflowgen.ops.slogdet import slogdet as slogdet
from pyflowgen.ops.slogdet import slogdet_reference as slogdet_reference
from pyflowgen.ops.trn import TRN as TRN
from pyflowgen.ops.trn import trn as trn
from pyflowgen.ops.trn import trn_reference as trn_reference
from pyflowgen.residual_flow import LipschitzMLP as LipschitzMLP
from pyflowgen.residual_flow import ResidualFlow as ResidualFlow
