"""The step kernels behind the signatures of their plain definitions, for the tests of both."""

import torch

from rlsd.kernels.step import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SINGLE = torch.float32


class Fused:
    """The kernels behind the signatures of naive.py: on copies of the state, with poisoned outputs."""

    @staticmethod
    def noise_zt(lanes, z, network, channels=1):
        shape = len(lanes.whole), z.shape[1]
        outputs = [poisoned(shape, SINGLE), poisoned(shape, network), poisoned(shape, network)]
        launch.noise_zt(lanes, z, *outputs, channels)
        return tuple(outputs)

    @staticmethod
    def step_z(lanes, z, m, v, eps, eps_theta, cotangent, null=None, repulsion=None, channels=1):
        state, eps = (z.clone(), m.clone(), v.clone()), eps.clone()
        z_t, z_network = poisoned(eps.shape, eps_theta.dtype), poisoned(eps.shape, eps_theta.dtype)
        flag = torch.zeros(len(eps), dtype=torch.int32, device=DEVICE)
        launch.step_z(lanes, state, eps, eps_theta, cotangent, z_t, z_network, flag, null, repulsion, channels)
        return (*state, eps, z_t, z_network, flag)

    @staticmethod
    def step_x(lanes, x, m, v, gradient, image, image_cotangent=None, channels=1, image_scale=None):
        state = (x.clone(), m.clone(), v.clone())
        x_operator, cotangent = poisoned(image.shape, gradient.dtype), poisoned(image.shape, image.dtype)
        flag = torch.zeros(len(image), dtype=torch.int32, device=DEVICE)
        launch.step_x(
            lanes, state, gradient, image, x_operator, cotangent, flag, image_cotangent, channels, image_scale
        )
        return (*state, x_operator, cotangent, flag)

    @staticmethod
    def operator_input(lanes, x, image, dtype, channels=1):
        out = poisoned(image.shape, dtype)
        launch.operator_input(lanes, x, image, out, channels)
        return out

    @staticmethod
    def gather_features(lanes, phi, rows):
        rows = rows.clone()
        launch.gather_features(lanes, phi, rows)
        return rows

    @staticmethod
    def spread_repulsion(lanes, repulsion, D, level, network):
        phi_cotangent, image_scale = poisoned((len(lanes.whole), D), network), poisoned((len(lanes.whole),), SINGLE)
        launch.spread_repulsion(lanes, repulsion, phi_cotangent, image_scale, level)
        return phi_cotangent, image_scale

    @staticmethod
    def start(lanes, value, m, v, stream):
        state = (value.clone(), m.clone(), v.clone())
        launch.start(lanes, state, stream)
        return state


def poisoned(shape, dtype):
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
