"""BasicSR's models for layers with running state: exact resume, and no step on non-finite values."""

import importlib
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from basicsr.losses import build_loss
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger, tensor2img
from basicsr.utils.dist_util import get_dist_info, master_only
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparse_sr_attn.backbones.base import Network
from sparse_sr_attn.checkpoints.convert import scale_biases
from sparse_sr_attn.checkpoints.foreign import Facts, find_facts, run_padded
from sparse_sr_attn.errors import CheckpointError, ConfigError, TrainingError
from sparse_sr_attn.inference.tiling import upscale_tiled
from sparse_sr_attn.layers import one_kmeans_update
from sparse_sr_attn.layers.lcoa import LSP
from sparse_sr_attn_basicsr import changed_options, option_names, pretrained, state
from sparse_sr_attn_basicsr.cuda_graph import GraphedForward
from sparse_sr_attn_basicsr.data import PLACE
from sparse_sr_attn_basicsr.delayed_step import DelayedOptimizer, DelayedStep, Forwarding
from sparse_sr_attn_basicsr.randomness import random_state, set_random_state, undisturbed

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What `train.autocast` may be."""

_UNHARMED = "Weights, buffers and optimizer are finite and as they were before this step."


class SparseSRModel(SRModel):  # type: ignore[misc]  # basicsr carries no types
    """`SRModel` with a complete EMA network, which stops before a non-finite value does harm.

    - The EMA network also gets copies of the buffers (k-means centroids, BatchNorm statistics); `SRModel` averages the
      parameters only.
    - Weights that a pretrained checkpoint lacks (new attention layers) start equal in both networks.
    - A non-finite image, loss or gradient raises `TrainingError` before anything has changed.
    - Files are written completely or not at all, and a state exists only with its weights. It contains all that an
      exact resume needs: random states and the position in the epoch.
    - Validation does not change the random states of training.

    Losses and gradients come from BasicSR's `optimize_parameters`, so losses that a fork adds to its `SRModel` work
    here, too. Only the steps of its optimizers and its EMA are delayed until all values are known to be finite.

    Options beyond those of `SRModel`, all off unless given:

    - `train.optim_g.type`: the optimizers of `torch.optim`.
    - `train.fft_opt`: a loss on the Fourier transforms, e.g. `FFTLoss`, in addition to BasicSR's losses.
    - `train.grad_clip`: upper bound of the gradient norm (2-norm over all weights).
    - `train.accumulate`: number of parts in which a batch is processed for one step of the optimizer.
    - `train.one_kmeans_update`: update the centroids once for all parts of a batch.
    - `train.autocast`: `bf16` or `fp16`, the precision in which the network is trained; losses, weights and validation
      stay in float32.
    - `train.channels_last`: weights and images in channels-last memory, which makes convolutions in half precision
      faster. Default: if `train.autocast` is set.
    - `train.cuda_graph`: run the forward and the backward pass of the generator as CUDA graphs (on one GPU), see
      `GraphedForward`.
    - `train.deterministic`: use only deterministic algorithms of PyTorch.
    - `train.pretrain_img_range`: the `img_range` of the training of `path.pretrain_network_g`, if it differs from the
      network's. Biases are scaled so that an EDSR gives the same image.
    - `val.tile`, `val.tile_overlap`: upscale larger images in tiles, see `upscale_tiled`.

    Attributes:
        iteration: number of finished iterations, as BasicSR counts them.
        saved_iteration: the last one that was saved or resumed; `None` for none.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        self.iteration = 0
        self.saved_iteration: int | None = None
        self._validating = False
        self._image_place: tuple[str, int | str] | None = None  # data set and iteration, where images are saved
        self._missing: dict[int, list[str]] = {}
        self._names: list[str] = []
        self._place: list[int] | None = None  # of the last sample trained on, see `data.PLACE`
        self._fed_place: list[int] | None = None
        self._num_overflows = 0
        self._delayed: DelayedStep | None = None
        self._cri_fft: nn.Module | None = None
        self._graphed: GraphedForward | None = None
        self._kept: list[Tensor] = []  # copies of all buffers, from before the step
        self._optimizer_names: list[str] = []
        train = opt.get("train") or {}
        self._grad_clip: float | None = train.get("grad_clip")
        self._num_parts: int = train.get("accumulate") or 1
        self._one_kmeans_update: bool = train.get("one_kmeans_update") or False
        # Only for weights to start from: those of a resumed or tested run have the network's own range.
        self._starts = bool(opt.get("is_train") and not opt["path"].get("resume_state"))
        self._pretrain_img_range: float | None = train.get("pretrain_img_range") if self._starts else None
        self._facts: Facts | None = None  # about a third-party network; found when needed
        self._told: set[str] = set()  # messages on weights, which two networks are loaded from
        self._dtype = AUTOCAST[train["autocast"]] if train.get("autocast") else None
        channels_last = train.get("channels_last")
        self._channels_last = self._dtype is not None if channels_last is None else channels_last
        if train.get("deterministic"):
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS raises an error without it
            torch.backends.cudnn.benchmark = False
            torch.use_deterministic_algorithms(True)
        super().__init__(opt)

    def model_to_device(self, net: nn.Module) -> nn.Module:
        """Move `net` to its device and, with a launcher, distribute it; also on the CPU, which BasicSR cannot."""
        if self._channels_last:
            net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if not (self.opt["dist"] and self.device.type == "cpu"):
            return super().model_to_device(net)
        return DistributedDataParallel(net, find_unused_parameters=self.opt.get("find_unused_parameters", False))

    def load_network(
        self, net: nn.Module, load_path: str, strict: bool = True, param_key: str | None = "params"
    ) -> None:
        """Load weights as BasicSR does, also from `.safetensors`, and record which entries the file lacks.

        Raises:
            CheckpointError: the file cannot be read, does not fit, or was trained with another `img_range`; says what
                to do.
        """
        bare = self.get_bare_model(net)
        if self.opt["path"].get("param_key_g", param_key) is None:
            param_key = None  # BasicSR asks for params_ema when it starts the averaged network
        loaded = pretrained.load(bare, load_path, strict=strict, key=param_key)
        different = loaded.different
        entry = f", entry {loaded.key}" if loaded.key else ""
        get_root_logger().info(f"Loading {type(bare).__name__} model from {load_path}{entry}.")
        untrained = len(different.untrained) + len(different.resized)
        for line in different.lines():
            self._tell(f"  {line}", logging.WARNING if untrained else logging.INFO)
        if untrained:
            self._tell(f"{untrained} entries outside attention are NOT in {load_path}: they start untrained.")
        self._missing[id(bare)] = loaded.missing
        if hasattr(self, "net_d"):  # a discriminator is loaded last, and has no range
            return
        if self._pretrain_img_range is not None:
            factor = float(bare.img_range) / self._pretrain_img_range
            scale_biases(bare, factor, but=loaded.missing)  # those missing in the file were not trained
        elif self._starts and (note := pretrained.check_img_range(bare, loaded, load_path)):
            self._tell(f"note: {note}")

    def _tell(self, message: str, level: int = logging.WARNING) -> None:
        """Log a message once."""
        if message not in self._told:
            self._told.add(message)
            get_root_logger().log(level, message)

    def get_optimizer(self, optim_type: str, params: Any, lr: float, **kwargs: Any) -> torch.optim.Optimizer:
        """Return the optimizer of `torch.optim` of that name."""
        self._optimizer_names.append(optim_type)
        return getattr(torch.optim, optim_type)(params, lr=lr, **kwargs)

    def init_training_settings(self) -> None:
        """Set up training as BasicSR does; copy weights that the checkpoint lacks from the network to its average."""
        super().init_training_settings()
        fft = self.opt["train"].get("fft_opt")
        host = [cls for cls in type(self).__mro__ if cls.__module__ != __name__]
        theirs = "fft_opt" in option_names.names_in(*host)
        self._cri_fft = build_loss(fft).to(self.device) if fft and not theirs else None
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self._dtype == torch.float16)
        if self.opt["train"].get("cuda_graph"):
            if self.net_g is not self.get_bare_model(self.net_g):
                raise ConfigError.at("train.cuda_graph", "must be false with several GPUs or processes, got true")
            self._graphed = GraphedForward(self.net_g)
        if hasattr(self, "net_g_ema"):
            trained = self.get_bare_model(self.net_g).state_dict()
            averaged = self.net_g_ema.state_dict()
            with torch.no_grad():
                for name in self._missing.get(id(self.net_g_ema), []):
                    averaged[name].copy_(trained[name])

    def model_ema(self, decay: float = 0.999) -> None:
        """Average the parameters, copy the buffers."""
        if self._delayed is not None:
            self._delayed.ema_decay = decay
            return
        trained, averaged = self.get_bare_model(self.net_g), self.net_g_ema
        with torch.no_grad():
            torch._foreach_mul_(list(averaged.parameters()), decay)
            torch._foreach_add_(list(averaged.parameters()), list(trained.parameters()), alpha=1 - decay)
            if buffers := list(trained.buffers()):
                torch._foreach_copy_(list(averaged.buffers()), buffers)

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
        if self._channels_last:
            self.lq: Tensor = self.lq.contiguous(memory_format=torch.channels_last)
        self._fed_place = data[PLACE][-1].tolist() if PLACE in data else None

    def optimize_parameters(self, current_iter: int) -> None:
        """Train on the batch of `feed_data`: one step of the optimizer, whatever the number of parts.

        In `fp16`, a non-finite gradient skips the step and reduces the loss scale, as usual. It is an error only if the
        scale is 1.

        Raises:
            TrainingError: the loss or the gradient is not finite. Weights, EMA, optimizer and buffers are
                unchanged.
        """
        net = self.get_bare_model(self.net_g)
        self._keep_buffers()
        with one_kmeans_update(net) if self._one_kmeans_update else nullcontext():
            done = self._compute(current_iter)
        losses, due = done.losses, [waiting.optimizer for waiting in done.optimizers.values() if waiting.due]
        if self.optimizer_g in due:
            self._scaler.unscale_(self.optimizer_g)
        clip = self._grad_clip if self.optimizer_g in due else None
        norm = {} if clip is None else {"grad_norm": _gradient_norm(net.parameters())}
        largest = {id(optimizer): _largest_gradient(optimizer) for optimizer in due}
        loss_values, norm_value, sizes = _read(losses, norm, largest)
        value = sum(loss_values.values())
        overflow = not math.isfinite(sizes.get(id(self.optimizer_g), 0.0))
        sound = math.isfinite(value) and all(
            math.isfinite(size) or (key == id(self.optimizer_g) and self._scaler.get_scale() > 1)
            for key, size in sizes.items()
        )
        if not self._everywhere(sound):
            self._undo()
            raise TrainingError(self._complaint(current_iter, losses, value, sum(sizes.values())))
        if clip is not None and not overflow:
            nn.utils.clip_grads_with_norm_(net.parameters(), clip, norm["grad_norm"])
            losses.update(norm)
            loss_values.update(norm_value)
        for optimizer in due:
            if optimizer is self.optimizer_g:
                self._scaler.step(optimizer)
                self._scaler.update()
            else:
                optimizer.step()
        self._num_overflows += overflow
        self.log_dict = self.reduce_loss_dict(losses) if self.opt["dist"] else OrderedDict(loss_values)
        if done.ema_decay is not None:
            self.model_ema(decay=done.ema_decay)
        self.iteration = current_iter
        self._place = self._fed_place

    def reduce_loss_dict(self, loss_dict: Mapping[str, Tensor]) -> "OrderedDict[str, float]":
        """Return the losses as numbers, averaged over processes; within a step, only record them."""
        if self._delayed is None:
            return super().reduce_loss_dict(loss_dict)
        self._delayed.note({**loss_dict, **self._delayed.own})
        self._delayed.own.clear()
        return OrderedDict()

    def test(self) -> None:
        """Upscale the images of `feed_data` with the EMA network, if there is one; in tiles if `val.tile` is given.

        If the network needs sides that are multiples of a number or not too short, images are padded and the result is
        cropped.
        """
        val = self.opt.get("val") or {}
        # Without its wrapper: only one process validates, and DistributedDataParallel would wait for the others.
        net = self.net_g_ema if hasattr(self, "net_g_ema") else self.get_bare_model(self.net_g)
        was_training = net.training
        net.eval()
        if self._facts is None and not isinstance(net, Network):
            self._facts = find_facts(net)
        padded = partial(run_padded, net, facts=self._facts)
        with torch.no_grad():
            if val.get("tile"):
                self.output = upscale_tiled(padded, self.lq, val["tile"], val.get("tile_overlap") or 0)
            else:
                self.output = padded(self.lq)
        net.train(was_training)

    def validation(self, dataloader: Any, current_iter: int | str, tb_logger: Any, save_img: bool = False) -> None:
        """Validate as BasicSR does, on one process, without changing random states.

        Images are saved where BasicSR saves them, completely or not at all.

        Raises:
            OSError: an image cannot be written.
        """
        self._validating = True
        self._image_place = (dataloader.dataset.opt["name"], current_iter) if save_img else None
        try:
            with undisturbed():
                super().validation(dataloader, current_iter, tb_logger, save_img=False)
        finally:
            self._validating = False
            self._image_place = None

    def get_current_visuals(self) -> "OrderedDict[str, Tensor]":
        """Return the last images and results; in validation, save the result if images are saved."""
        visuals: OrderedDict[str, Tensor] = super().get_current_visuals()
        if self._image_place is not None:
            state.write_image(tensor2img([visuals["result"]]), self._image_file(*self._image_place))
        return visuals

    def _image_file(self, dataset: str, current_iter: int | str) -> Path:
        """Return where BasicSR's validation saves the image of the last sample."""
        folder, name = Path(self.opt["path"]["visualization"]), Path(self._names[0]).stem
        if self.opt["is_train"]:
            return folder / name / f"{name}_{current_iter}.png"
        return folder / dataset / f"{name}_{self.opt['val']['suffix'] or self.opt['name']}.png"

    def save(self, epoch: int, current_iter: int) -> None:
        """Save networks and state. A state exists only together with the networks that it was saved with.

        A file that cannot be written is logged, and training continues; older files are unchanged. Several processes
        stop, because the others do not notice, and so does the end of training (`current_iter` -1), which has no state.

        Raises:
            CheckpointError: a file cannot be written, at the end of training or with several processes.
        """
        try:
            self._remove_state(current_iter)
            super().save(epoch, current_iter)
        except OSError as error:
            message = f"cannot save iteration {self.iteration:,} in {self.opt['path']['models']}: {error}"
            if current_iter == -1 or self.opt.get("dist"):
                raise CheckpointError(message) from error
            get_root_logger().error(f"{message}; training continues, and earlier files are complete")
            return
        self.saved_iteration = current_iter

    @master_only  # type: ignore[untyped-decorator]
    def save_network(
        self,
        net: nn.Module | list[nn.Module],
        net_label: str,
        current_iter: int,
        param_key: str | list[str] = "params",
    ) -> None:
        """Save networks under BasicSR's names, completely or not at all.

        Raises:
            OSError: the file cannot be written; an existing file is unchanged.
        """
        nets = net if isinstance(net, list) else [net]
        keys = param_key if isinstance(param_key, list) else [param_key]
        weights = {
            key: {name: value.cpu() for name, value in self.get_bare_model(each).state_dict().items()}
            for key, each in zip(keys, nets, strict=True)
        }
        label = "latest" if current_iter == -1 else current_iter
        state.write(weights, Path(self.opt["path"]["models"]) / f"{net_label}_{label}.pth")

    def save_training_state(self, epoch: int, current_iter: int) -> None:
        """Save BasicSR's state and, under `exact`, what an exact resume needs; completely or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        if current_iter == -1:
            return
        rank, num_processes = get_dist_info()
        random_states: list[Any] = [random_state()]
        if num_processes > 1:
            random_states *= num_processes
            dist.all_gather_object(random_states, random_state())
        if rank != 0:
            return
        saved = {
            "epoch": epoch,
            "iter": current_iter,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "exact": {
                "optimizer": ", ".join(self._optimizer_names),
                "scaler": self._scaler.state_dict(),
                "warmup_iter": changed_options.warmup_of(self),
                "manual_seed": self.opt.get("manual_seed"),
                "place": self._place,
                "random": random_states,
            },
        }
        state.write(saved, self._state_file(current_iter))

    def is_healthy(self) -> bool:
        """Return whether every weight and every buffer is finite."""
        return all(_finite(net.parameters()) and _finite(net.buffers()) for net in self._nets())

    def resume_training(self, resume_state: Mapping[str, Any]) -> None:
        """Restore a saved state, so that training continues as if it had not been stopped.

        A state without `exact`, such as one of BasicSR's models, is restored as far as possible.

        Raises:
            CheckpointError: the state was saved with another optimizer.
            Exception: anything that a state of another model leads to.
        """
        exact = resume_state.get("exact") or {}
        names = ", ".join(self._optimizer_names)
        saved_with = exact.get("optimizer", names if len(self._optimizer_names) > 1 else "Adam")
        if saved_with != names:
            raise CheckpointError(
                f"train.optim_g.type must be {saved_with}, with which it was saved, got {names}; to change it, start a "
                "new run with these weights as path.pretrain_network_g"
            )
        super().resume_training(resume_state)
        self.iteration = int(resume_state["iter"])
        if exact:
            self._place = exact["place"]
            if self._scaler.is_enabled() and exact["scaler"]:
                self._scaler.load_state_dict(exact["scaler"])
            rank, num_processes = get_dist_info()
            if len(exact["random"]) == num_processes:
                set_random_state(exact["random"][rank])
        if self._state_file(self.iteration).is_file():
            self.saved_iteration = self.iteration

    def get_current_log(self) -> "OrderedDict[str, float]":
        """Return the losses and, if there are any, the numbers of skipped k-means updates and steps."""
        log = OrderedDict(self.log_dict)
        skipped = sum(int(m.num_skipped) for m in self.get_bare_model(self.net_g).modules() if isinstance(m, LSP))
        if skipped:
            log["kmeans_skipped"] = float(skipped)
        if self._num_overflows:
            log["steps_skipped"] = float(self._num_overflows)
        return log

    def _nets(self) -> list[nn.Module]:
        """Return the trained networks: the generator and, of a GAN, the discriminator."""
        return [self.get_bare_model(getattr(self, name)) for name in ("net_g", "net_d") if hasattr(self, name)]

    def _compute(self, current_iter: int) -> DelayedStep:
        """Let BasicSR's model compute losses and gradients, part by part; delay what it does with them."""
        net, whole = self.net_g, {name: self.__dict__[name] for name in ("lq", "gt") if name in self.__dict__}
        optimizers = {name: value for name, value in self.__dict__.items() if isinstance(value, torch.optim.Optimizer)}
        if self._graphed is not None:
            self._graphed.begin_step()
        done = self._delayed = DelayedStep(
            {name: DelayedOptimizer(optimizer) for name, optimizer in optimizers.items()}
        )
        parts = list(zip(*(images.chunk(self._num_parts) for images in whole.values()), strict=True))
        self.__dict__.update(done.optimizers, net_g=Forwarding(net, self._forward))
        try:
            for number, images in enumerate(parts, start=1):
                self.__dict__.update(zip(whole, images, strict=True))
                done.begin(fraction=len(images[0]) / len(whole["lq"]))
                alone = isinstance(net, DistributedDataParallel) and number < len(parts)
                with net.no_sync() if alone else nullcontext():
                    super().optimize_parameters(current_iter)
        finally:
            self.__dict__.update(whole | optimizers, net_g=net)
            self._delayed = None
        return done

    def _forward(self, net: nn.Module, low: Tensor) -> Tensor:
        """Return the image; its gradient will be scaled by the fraction of this part and by the loss scale."""
        done = self._delayed
        with self._autocast():
            output: Tensor = (self._graphed or net)(low)
        output = output.float()
        if done is None or not output.requires_grad:
            return output
        own = self._own_losses(self._cri_fft, output.detach()) if self._cri_fft is not None else None

        def scaled(gradient: Tensor) -> Tensor:
            nonlocal own
            if own is not None:
                losses, extra = own
                done.own.update(losses)
                gradient, own = gradient + extra, None
            return self._scaler.scale(gradient if done.fraction == 1 else done.fraction * gradient)

        if own is not None or done.fraction != 1 or self._scaler.is_enabled():
            output.register_hook(scaled)
        return output

    def _own_losses(self, criterion: nn.Module, output: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the losses that BasicSR's model does not compute, and the gradient of their sum."""
        with torch.enable_grad():
            loss = criterion(output.requires_grad_(), self.gt)
            (gradient,) = torch.autograd.grad(loss, output)
        return {"l_fft": loss.detach()}, gradient

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._dtype is None:
            return nullcontext()
        # A graph must contain the casts of the weights, not read a copy from an earlier pass.
        return torch.autocast(self.device.type, self._dtype, cache_enabled=self._graphed is None)

    def _state_file(self, iteration: int) -> Path:
        return Path(self.opt["path"]["training_states"]) / f"{iteration}.state"

    @master_only  # type: ignore[untyped-decorator]
    def _remove_state(self, iteration: int) -> None:
        state.remove(self._state_file(iteration))

    def _unfit(self, images: Tensor | None) -> Iterable[str]:
        """Return the names of the samples that are not finite."""
        if images is None or bool(images.isfinite().all()):
            return ()
        fine = images.isfinite().flatten(1).all(dim=1).tolist()
        names = self._names if len(self._names) == len(fine) else [f"sample {i} of the batch" for i in range(len(fine))]
        return (name for name, good in zip(names, fine, strict=True) if not good)

    def _everywhere(self, good: bool) -> bool:
        """Return whether `good` is true on every process, so that all stop together and the first can save."""
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
        harm = _UNHARMED if self.is_healthy() else "But weights or buffers were not finite before this step."
        return (
            f"iteration {current_iter:,}: {fault} ({parts}; learning rate {self.get_current_learning_rate()[0]:.3g}); "
            f"images of the batch{_listed(self._names)}\n{harm}"
        )

    def _keep_buffers(self) -> None:
        buffers = [buffer for net in self._nets() for buffer in net.buffers()]
        if len(self._kept) != len(buffers):
            self._kept = [buffer.clone() for buffer in buffers]
        elif buffers:
            torch._foreach_copy_(self._kept, buffers)

    def _undo(self) -> None:
        """Restore all buffers to what they were before the step, and clear the gradients."""
        with torch.no_grad():
            for buffer, before in zip((b for net in self._nets() for b in net.buffers()), self._kept, strict=True):
                buffer.copy_(before)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self._scaler.update(self._scaler.get_scale())  # keeps the scale, and allows the next step


def _largest_gradient(optimizer: torch.optim.Optimizer) -> Tensor:
    return _gradient_norm((weight for group in optimizer.param_groups for weight in group["params"]), float("inf"))


def _gradient_norm(weights: Iterable[Tensor], order: float = 2.0) -> Tensor:
    return nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None], order)


def _read(*scalars: Mapping[Any, Tensor]) -> list[dict[Any, float]]:
    """Return the numbers in each mapping. They are read together: each read waits for the GPU."""
    tensors = [tensor.float() for mapping in scalars for tensor in mapping.values()]
    numbers = iter(torch.stack([tensor.to(tensors[0].device) for tensor in tensors]).tolist())
    return [{key: next(numbers) for key in mapping} for mapping in scalars]


def _finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether all values are finite, with one synchronisation."""
    flags = [tensor.detach().isfinite().all() for tensor in tensors]
    return not flags or bool(torch.stack(flags).all())


def _image_names(data: Mapping[str, Any]) -> list[str]:
    names = data.get("lq_path", data.get("gt_path", []))
    return [names] if isinstance(names, str) else [str(name) for name in names]


def _listed(names: Iterable[str]) -> str:
    lines = [f"\n  {name}" for name in dict.fromkeys(names)]
    return (":" + "".join(lines)) if lines else ""


def variant(name: str) -> type[SparseSRModel] | None:
    """Return `Sparse<name>`, our counterpart of another model of BasicSR; `None` if this BasicSR lacks the model."""
    module = f"basicsr.models.{name.removesuffix('Model').lower()}_model"
    try:
        host = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None
    text = f"`SparseSRModel` for the host's `{name}`."
    return type(f"Sparse{name}", (SparseSRModel, host), {"__module__": __name__, "__doc__": text})
