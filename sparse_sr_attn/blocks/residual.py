"""Residual blocks of convolutional super-resolution networks."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_sr_attn.config import Finite, PositiveInt, checked


class ResidualBlock(nn.Module):
    r"""EDSR's block without normalisation: $x + \rho\,\mathrm{conv}(\mathrm{ReLU}(\mathrm{conv}(x)))$.

    Args:
        num_feat: channels.
        res_scale: $\rho$, factor on the residual branch.

    Source:
        Lim et al., "Enhanced Deep Residual Networks", CVPRW 2017; state-dict keys as in BasicSR.
    """

    @checked
    def __init__(self, num_feat: PositiveInt, res_scale: Finite = 1.0) -> None:
        super().__init__()
        self.res_scale = res_scale
        self.conv1 = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.conv2 = nn.Conv2d(num_feat, num_feat, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return a map of the same size."""
        branch: Tensor = self.conv2(F.relu(self.conv1(x)))
        return x + self.res_scale * branch
