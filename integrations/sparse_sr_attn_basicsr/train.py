"""The training loop, on BasicSR's public parts: its data sets, loaders, models and loggers.

BasicSR's own loop saves no random numbers and no place in the epoch, so what it resumes differs from a run that was
never stopped. This loop resumes exactly, and reports from where after any failure.
"""

import datetime
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from basicsr.models import build_model
from basicsr.utils import (
    AvgTimer,
    MessageLogger,
    get_env_info,
    get_time_str,
    init_tb_logger,
    init_wandb_logger,
    make_exp_dirs,
    mkdir_and_rename,
    set_random_seed,
)
from basicsr.utils.options import dict2str

from sparse_sr_attn.errors import CheckpointError, first_line
from sparse_sr_attn_basicsr import changed_options, state
from sparse_sr_attn_basicsr.data import PLACE
from sparse_sr_attn_basicsr.loaders import evaluation_loader, training_batches
from sparse_sr_attn_basicsr.logs import log_to

_LOG = logging.getLogger(__name__)
_LONGEST_SILENCE = 15.0  # seconds


class Run:
    """One training run: where it starts, how far it is, and what can be saved when it fails.

    Args:
        opt: complete options, see `option_file.complete`.

    Attributes:
        model: once it is built.
        epoch: of the last batch trained on.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        self.opt = opt
        self.model: Any = None
        self.epoch = 0

    def train(self, record_options: Callable[[Path], None]) -> None:
        """Train to the last iteration, from the state to resume or from the beginning.

        Args:
            record_options: writes the option file into the folder of the experiment, once that is there.
        """
        opt, resumed = self.opt, self._find_state()
        if opt["manual_seed"] is None:
            opt["manual_seed"] = random.randint(1, 10000)  # noqa: S311
        set_random_seed(opt["manual_seed"] + opt["rank"])
        if resumed is None:
            self._begin_folders()
        if opt["rank"] == 0:
            record_options(Path(opt["path"]["experiments_root"]))
        with log_to(f"{opt['path']['log']}/train_{opt['name']}_{get_time_str()}.log") as logger:
            logger.info(get_env_info())
            logger.info(dict2str(opt))
            tb_logger = _tb_logger(opt)
            try:
                self._train(resumed, tb_logger, logger)
            finally:
                if tb_logger:
                    tb_logger.close()

    def _find_state(self) -> dict[str, Any] | None:
        """Return the state to resume, or `None`; log why a resumed run would not be exact."""
        notes: list[str] = []
        resumed = state.find_state(self.opt, notes)
        if resumed is not None:
            if self.opt["manual_seed"] is None:
                self.opt["manual_seed"] = (resumed.get("exact") or {}).get("manual_seed")
            inexact = "training resumes, but not exactly as if it had not been stopped"
            notes += [f"{inexact}: {reason}" for reason in state.inexactness(resumed, self.opt)]
        for note in notes:
            _LOG.warning("note: %s", note)
        return resumed

    def _begin_folders(self) -> None:
        """Create the folders of the experiment; archive those of an earlier run with this name."""
        make_exp_dirs(self.opt)
        if _logs_to_tensorboard(self.opt) and self.opt["rank"] == 0:
            mkdir_and_rename(f"{self.opt['root_path']}/tb_logger/{self.opt['name']}")

    def _train(self, resumed: dict[str, Any] | None, tb_logger: Any, logger: logging.Logger) -> None:
        opt = self.opt
        iteration, start = 0, (0, 0)
        if resumed is not None:
            iteration, self.epoch = int(resumed["iter"]), int(resumed["epoch"])
            place = (resumed.get("exact") or {}).get("place")
            start = (place[0], place[1]) if place else (self.epoch, 0)
        total = int(opt["train"]["total_iter"])
        batches = training_batches(opt, max(0, total - iteration), start)
        val_loaders = [evaluation_loader(each, opt) for each in opt["datasets"].values() if each["phase"] == "val"]
        self.model = build_model(opt)
        if resumed is not None:
            _restore(self.model, resumed, logger)
            logger.info(f"Resuming training from epoch: {self.epoch}, iter: {iteration}.")
        logger.info(f"Start training from epoch: {self.epoch}, iter: {iteration}")
        started = time.monotonic()
        for done in self._iterations(batches, iteration, tb_logger):
            iteration = done
            if iteration % opt["logger"]["save_checkpoint_freq"] == 0:
                logger.info("Saving models and training states.")
                self.model.save(self.epoch, iteration)
            if opt.get("val") and iteration % opt["val"]["val_freq"] == 0:
                self._validate(val_loaders, iteration, tb_logger)
        logger.info(f"End of training. Time consumed: {datetime.timedelta(seconds=int(time.monotonic() - started))}")
        logger.info("Save the latest model.")
        self.model.save(epoch=-1, current_iter=-1)  # -1 is the latest
        if opt.get("val"):
            self._validate(val_loaders, iteration, tb_logger)

    def _iterations(self, batches: Iterator[Mapping[str, Any]], start: int, tb_logger: Any) -> Iterator[int]:
        """Train on each batch, and yield the number of iterations done.

        The first iteration is logged, then those of `print_freq`, and others if nothing has been logged for a while.
        """
        opt, model = self.opt, self.model
        messages = MessageLogger(opt, start, tb_logger)
        data_timer, iter_timer, logged = AvgTimer(), AvgTimer(), time.monotonic()
        for iteration, batch in enumerate(batches, start=start + 1):
            data_timer.record()
            model.update_learning_rate(iteration, warmup_iter=opt["train"].get("warmup_iter", -1))
            model.feed_data(batch)
            model.optimize_parameters(iteration)
            iter_timer.record()
            self.epoch = int(batch[PLACE][-1][0])
            is_first, is_silent = iteration == start + 1, time.monotonic() - logged >= _LONGEST_SILENCE
            if is_first or is_silent or iteration % opt["logger"]["print_freq"] == 0:
                logged = time.monotonic()
                times = {"time": iter_timer.get_avg_time(), "data_time": data_timer.get_avg_time()}
                rates = {"lrs": model.get_current_learning_rate()}
                messages({"epoch": self.epoch, "iter": iteration, **rates, **times, **model.get_current_log()})
            if is_first:
                messages.reset_start_time()  # it includes lazy initialisation
            yield iteration
            data_timer.start()
            iter_timer.start()

    def _validate(self, loaders: list[Any], iteration: int, tb_logger: Any) -> None:
        for loader in loaders:
            self.model.validation(loader, iteration, tb_logger, self.opt["val"]["save_img"])

    def save(self, *, together: bool) -> str:
        """Save the current state, and return a sentence that says where.

        Args:
            together: whether all processes save; one alone would wait for the others.
        """
        model, folder = self.model, Path(self.opt["path"]["training_states"])
        if model is None:
            return "Nothing was trained."
        if not hasattr(model, "saved_iteration") or (self.opt["dist"] and not together):
            return f"What was saved before is in {folder}."
        if not model.is_healthy():
            return f"It is not saved; the states before it are in {folder}."
        if model.saved_iteration != model.iteration:
            model.save(self.epoch, model.iteration)
        if model.saved_iteration != model.iteration:
            return f"It could not be saved; the states before it are in {folder}."
        return (
            f"The state after iteration {model.iteration:,} is saved: {folder / f'{model.iteration}.state'}\n"
            "Fix the cause, then resume with --auto_resume."
        )

    def newest_state(self) -> str:
        """Return a sentence on the newest saved state."""
        states = state.list_states(Path(self.opt["path"]["training_states"]))
        if not states:
            return "No state was saved yet."
        return f"The newest state is {states[-1]}; resume from it with --auto_resume."


def _restore(model: Any, resumed: Mapping[str, Any], logger: logging.Logger) -> None:
    """Restore a state in a model, with the options of the file.

    Raises:
        CheckpointError: the state does not fit.
    """
    where = f"the state of iteration {resumed['iter']}"
    try:
        changes = changed_options.restore_with_new_options(model, resumed)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except Exception as error:  # a malformed state can raise anything
        raise CheckpointError(f"{where}: does not fit this network and these options: {first_line(error)}") from error
    for change in changes:
        logger.warning(f"note: {change}; from here on, the value in the option file applies")


def _logs_to_tensorboard(opt: Mapping[str, Any]) -> bool:
    return bool(opt["logger"].get("use_tb_logger")) and "debug" not in opt["name"]


def _tb_logger(opt: Mapping[str, Any]) -> Any:
    """Return the TensorBoard writer, if it is enabled; start wandb, which mirrors it, before."""
    if (opt["logger"].get("wandb") or {}).get("project") is not None and "debug" not in opt["name"]:
        init_wandb_logger(opt)
    if not _logs_to_tensorboard(opt):
        return None
    return init_tb_logger(log_dir=f"{opt['root_path']}/tb_logger/{opt['name']}")
