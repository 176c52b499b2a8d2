"""Drop-in faster PyTorch layers for generative flows and streaming action detection."""

__version__ = "0.1.0"

from pyflowgen._native import build_info as build_info
from pyflowgen._native import reference_path as reference_path
from pyflowgen.ops.affine_coupling import AdditiveCoupling as AdditiveCoupling
from pyflowgen.ops.affine_coupling import AffineCoupling as AffineCoupling
from pyflowgen.ops.affine_coupling import affine_coupling as affine_coupling
from pyflowgen.ops.affine_coupling import affine_coupling_reference as affine_coupling_reference
from pyflowgen.ops.linear import Linear as Linear
from pyflowgen.ops.linear import linear as linear
from pyflowgen.ops.linear import linear_reference as linear_reference
