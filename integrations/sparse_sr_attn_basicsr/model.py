"""BasicSR's `SRModel`, made safe for layers that keep a state of their own."""

import math
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from torch import Tensor, nn

from sparse_sr_attn.errors import CheckpointError, TrainingError
from sparse_sr_attn.layers.lcoa import LSP

_HEARTBEAT_SECONDS = 15.0
_UNHARMED = "Weights, optimizer and k-means state are finite and as they were before this step."


class SparseSRModel(SRModel):  # type: ignore[misc]  # basicsr carries no types
    """`SRModel` whose EMA network is whole, and which stops before a number that is not finite does harm.

    - The EMA network gets all buffers of the trained one (k-means centroids, BatchNorm statistics), copied and not
      averaged; `SRModel` averages the parameters and forgets the buffers.
    - Weights that a pretrained checkpoint does not have (new attention layers) start the same in both networks.
    - An image, a loss or a gradient that is not finite raises `TrainingError` before anything has changed.
    - A first line comes after the first iteration, and then at least every 15 seconds.

    Attributes:
        iteration: iterations finished, counted as BasicSR counts them.
        saved_iteration: the one last saved in this process, or `None`.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        self.iteration = 0
        self.saved_iteration: int | None = None
        self._validating = False
        self._missing: dict[int, list[str]] = {}
        self._names: list[str] = []
        self._started = self._spoke = time.monotonic()
        self._first: int | None = None
        super().__init__(opt)

    def load_network(
        self, net: nn.Module, load_path: str, strict: bool = True, param_key: str | None = "params"
    ) -> None:
        """Load weights as BasicSR does, and remember which entries the file did not have.

        Raises:
            CheckpointError: the file does not fit; with what to do about it.
        """
        bare = self.get_bare_model(net)
        missing: list[str] = []
        handle = bare.register_load_state_dict_post_hook(lambda _, keys: missing.extend(keys.missing_keys))
        try:
            super().load_network(net, load_path, strict, param_key)
        except (RuntimeError, KeyError) as error:
            raise CheckpointError(_why_not_loaded(load_path, error, strict, param_key)) from error
        finally:
            handle.remove()
        self._missing[id(bare)] = missing

    def init_training_settings(self) -> None:
        """Set up training as BasicSR does, then make the two networks start alike where the checkpoint is silent."""
        super().init_training_settings()
        if hasattr(self, "net_g_ema"):
            trained = self.get_bare_model(self.net_g).state_dict()
            averaged = self.net_g_ema.state_dict()
            with torch.no_grad():
                for name in self._missing.get(id(self.net_g_ema), []):
                    averaged[name].copy_(trained[name])

    def model_ema(self, decay: float = 0.999) -> None:
        """Average the parameters, copy the buffers."""
        super().model_ema(decay)
        averaged = dict(self.net_g_ema.named_buffers())
        for name, buffer in self.get_bare_model(self.net_g).named_buffers():
            averaged[name].copy_(buffer)

    def feed_data(self, data: Mapping[str, Any]) -> None:
        """Take a batch.

        Raises:
            TrainingError: a value in it is not finite; names the image files.
        """
        self._names = _image_names(data)
        bad = sorted({name for key in ("lq", "gt") for name in self._unfit(data.get(key))})
        if not self._everywhere(not bad):
            where = f"these images{_listed(bad)}" if bad else "images of another process"
            message = f"pixels must be finite, but NaN or infinity is in {where}"
            if self.is_train:
                message = f"after iteration {self.iteration:,}: {message}\nNothing was computed from them. {_UNHARMED}"
            raise TrainingError(message)
        super().feed_data(data)

    def optimize_parameters(self, current_iter: int) -> None:
        """Train on the batch that was fed.

        Raises:
            TrainingError: loss or gradient is not finite. Nothing has changed then: neither weights nor EMA, nor
                optimizer, nor buffers.
        """
        net = self.get_bare_model(self.net_g)
        buffers = [buffer.clone() for buffer in net.buffers()]
        self.optimizer_g.zero_grad()
        self.output = self.net_g(self.lq)
        losses = self._losses()
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        value = float(total.detach())
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        largest = float(nn.utils.get_total_norm(gradients, float("inf")))
        if not self._everywhere(math.isfinite(value) and math.isfinite(largest)):
            self._undo(net, buffers)
            raise TrainingError(self._complaint(current_iter, losses, value, largest))
        self.optimizer_g.step()
        self.log_dict = self.reduce_loss_dict(losses)
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)
        self.iteration = current_iter
        self._heartbeat(current_iter)

    def validation(self, dataloader: Any, current_iter: int | str, tb_logger: Any, save_img: bool = False) -> None:
        """Validate as BasicSR does: on one process, whatever the others do."""
        self._validating = True
        try:
            super().validation(dataloader, current_iter, tb_logger, save_img)
        finally:
            self._validating = False
            self._spoke = time.monotonic()

    def save(self, epoch: int, current_iter: int) -> None:
        """Save networks and state, and remember that this iteration is saved."""
        super().save(epoch, current_iter)
        self.saved_iteration = current_iter

    def is_healthy(self) -> bool:
        """Return whether every weight and every buffer is finite."""
        net = self.get_bare_model(self.net_g)
        return _finite(net.parameters()) and _finite(net.buffers())

    def resume_training(self, resume_state: Mapping[str, Any]) -> None:
        """Take up optimizers, schedulers and the iteration of a saved state."""
        super().resume_training(resume_state)
        self.iteration = int(resume_state["iter"])

    def get_current_log(self) -> "OrderedDict[str, float]":
        """Return the losses and, if there are any, the number of k-means updates that were skipped."""
        self._spoke = time.monotonic()
        log = OrderedDict(self.log_dict)
        skipped = sum(int(m.num_skipped) for m in self.get_bare_model(self.net_g).modules() if isinstance(m, LSP))
        if skipped:
            log["kmeans_skipped"] = float(skipped)
        return log

    def _losses(self) -> "OrderedDict[str, Tensor]":
        losses: OrderedDict[str, Tensor] = OrderedDict()
        if self.cri_pix:
            losses["l_pix"] = self.cri_pix(self.output, self.gt)
        if self.cri_perceptual:
            content, style = self.cri_perceptual(self.output, self.gt)
            losses.update({k: v for k, v in (("l_percep", content), ("l_style", style)) if v is not None})
        return losses

    def _unfit(self, images: Tensor | None) -> Iterable[str]:
        """Return the names of the samples that are not finite."""
        if images is None or bool(images.isfinite().all()):
            return ()
        fine = images.isfinite().flatten(1).all(dim=1).tolist()
        names = self._names if len(self._names) == len(fine) else [f"sample {i} of the batch" for i in range(len(fine))]
        return (name for name, good in zip(names, fine, strict=True) if not good)

    def _everywhere(self, good: bool) -> bool:
        """Return whether `good` holds on every process, so that all stop together and the first can save."""
        training_together = self.is_train and not self._validating and self.opt.get("dist")
        if not (training_together and dist.is_available() and dist.is_initialized()):
            return good
        flag = torch.tensor(float(good), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag.item())

    def _complaint(self, current_iter: int, losses: Mapping[str, Tensor], value: float, largest: float) -> str:
        if not math.isfinite(value):
            fault = f"the loss must be finite, got {value}"
        elif not math.isfinite(largest):
            fault = f"the gradient must be finite, but NaN or infinity is in it (the loss was {value:.6g})"
        else:
            fault = "loss and gradient must be finite, but are not in another process"
        parts = ", ".join(f"{name} {float(loss.detach()):.6g}" for name, loss in losses.items())
        state = _UNHARMED if self.is_healthy() else "But weights or buffers were not finite before this step."
        return (
            f"iteration {current_iter:,}: {fault} ({parts}; learning rate {self.get_current_learning_rate()[0]:.3g}); "
            f"images of the batch{_listed(self._names)}\n{state}"
        )

    def _undo(self, net: nn.Module, buffers: list[Tensor]) -> None:
        with torch.no_grad():
            for buffer, before in zip(net.buffers(), buffers, strict=True):
                buffer.copy_(before)
        self.optimizer_g.zero_grad()

    def _heartbeat(self, current_iter: int) -> None:
        """Log a line after the first iteration, and whenever BasicSR's own lines are slow to come."""
        now = time.monotonic()
        first = self._first is None
        printed = current_iter % self.opt["logger"]["print_freq"] == 0  # by BasicSR itself, in a moment
        if first:
            # The first iteration pays for what is set up lazily: time is counted from its end.
            self._first, self._started = current_iter, now
        if printed or (not first and now - self._spoke < _HEARTBEAT_SECONDS):
            return
        self._spoke = now
        total = int(self.opt["train"]["total_iter"])
        losses = " ".join(f"{name}: {value:.4e}" for name, value in self.log_dict.items())
        message = f"iter {current_iter:,} of {total:,} {losses}"
        if not first and self._first is not None:
            pace = (now - self._started) / (current_iter - self._first)
            message += f", {pace:.2f} s an iteration, about {_clock(pace * (total - current_iter))} to go"
        get_root_logger().info(message)


def _finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether all values are finite, with one look from the host."""
    flags = [tensor.detach().isfinite().all() for tensor in tensors]
    return not flags or bool(torch.stack(flags).all())


def _image_names(data: Mapping[str, Any]) -> list[str]:
    names = data.get("lq_path", data.get("gt_path", []))
    return [names] if isinstance(names, str) else [str(name) for name in names]


def _listed(names: Iterable[str]) -> str:
    lines = [f"\n  {name}" for name in dict.fromkeys(names)]
    return (":" + "".join(lines)) if lines else ""


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _why_not_loaded(path: str, error: Exception, strict: bool, param_key: str | None) -> str:
    if isinstance(error, KeyError):
        return (
            f"{path}: must hold the weights under {param_key!r} (path: param_key_g), but has no such entry; "
            "for a file that is a bare state dict write param_key_g: ~"
        )
    text = f"{path}: does not fit the network. {error}"
    if strict and "Missing key(s)" in str(error):
        text += (
            "\nIf these are attention layers that the checkpoint was trained without, write strict_load_g: false "
            "under path: they then start fresh."
        )
    return text
