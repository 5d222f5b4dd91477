"""The training loop: one function, on one process or on many."""

import math
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from dualform.core.calls import explained
from dualform.core.errors import DualformError
from dualform.core.json_file import to_json
from dualform.models.lm import LanguageModel
from dualform.models.saving.files import replacing_file
from dualform.models.saving.folder import BEST, CHECKPOINTS, MODEL, checkpoints
from dualform.models.tokenizer import Tokenizer
from dualform.train import setup, told
from dualform.train.best import Best
from dualform.train.capture import as_written, capture
from dualform.train.checkpoint import Position, restore_checkpoint, save_checkpoint
from dualform.train.claim import DATA, SUMMARY_FILE, claimed
from dualform.train.commands import resuming
from dualform.train.data import Dataset, open_dataset
from dualform.train.evaluate import bits_per_byte
from dualform.train.finite import magnitude, not_finite
from dualform.train.interrupt import Interrupts
from dualform.train.objective import Objective
from dualform.train.optim import build_optimizer, schedule, set_learning_rate
from dualform.train.packed import Packed, Portion
from dualform.train.recipe import Recipe
from dualform.train.report import Report, amount, duration

_GLANCE = 2**15  # held-out tokens of an evaluation on the way
_PROBE = 2**9  # held-out tokens that weights must read without overflow before they are saved
_SIGPIPE = 13  # Windows has no name for it
_TIMES = 10  # evaluations and checkpoints of a run where the recipe does not say


@explained
def train(recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> Path:
    """Train a language model.

    The run's folder then holds ``model/`` (for :func:`dualform.load`), ``best/``, the model with the lowest held-out
    loss of all evaluations, ``checkpoints/``, ``metrics.jsonl``, ``summary.json``, ``loss.png``, ``tensorboard/``, the
    recipe and the tokens.

    A resumed run computes what an unbroken one would have. SIGINT, SIGTERM and SIGHUP end a run between two steps,
    after a checkpoint; so does a console whose reader is gone. Weights and moments are saved only where all of them are
    finite. One process holds the folder until the run ends. Under ``torchrun`` or ``accelerate launch`` every process
    calls this function; together they compute what one process would.

    Args:
        recipe: what to train, on what, and for how long.
        resume: go on from the newest checkpoint in ``recipe.out``.
        console: where lines and the progress bar go; standard output by default.

    Returns:
        The run's folder.

    Raises:
        ArgumentError: for no recipe, or a device that cannot be used.
        ConfigError: for a recipe that cannot be trained.
        DataError: for data that cannot be trained on.
        CheckpointError: for a folder that another process holds, that has a run already or, resuming, none; or that
            cannot be written.
        DualformError: when the loss, the weights or the optimiser's moments are no longer finite; names the
            checkpoint from which the run can be resumed.
        KeyboardInterrupt: after SIGINT.
        SystemExit: after SIGTERM or SIGHUP, or where the console's reader is gone.
    """
    recipe, accelerator = setup.settled(recipe, resume), setup.build_accelerator(recipe)
    model, tokenizer = setup.build_model(recipe)
    device, template = setup.device_of(recipe, accelerator), setup.template_of(recipe, model, tokenizer)
    with ExitStack() as stack:
        if device.type == "cuda" and device.index is not None:
            stack.enter_context(torch.cuda.device(device))  # graphs and kernels, too
        with setup.all_or_none(accelerator):
            if accelerator.is_main_process:
                stack.enter_context(claimed(recipe, tokenizer, resume, template))
            else:
                console = Console(quiet=True)
        dataset = open_dataset(recipe.data, tokenizer, Path(recipe.out) / DATA, template)
        run = _Run(recipe, accelerator, device, model, tokenizer, dataset)
        return run.go(console or Console())


class _Run:
    """The state of a run between two steps, and how it gets to the next."""

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        device: torch.device,
        model: LanguageModel,
        tokenizer: Tokenizer,
        dataset: Dataset,
    ):
        self.recipe, self.accelerator, self.dataset, self.tokenizer = recipe, accelerator, dataset, tokenizer
        self.out, self.device = Path(recipe.out), device
        self.model = model.to(self.device)
        self.model.recompute = recipe.recompute
        self.bfloat16 = setup.uses_bfloat16(recipe, self.device)
        self.optimizer = build_optimizer(self.model, recipe.optim)
        at, self.changed = Position(), list[str]()
        if saved := checkpoints(self.out / CHECKPOINTS):
            at, self.changed = restore_checkpoint(saved[-1], recipe, self.model, self.optimizer)
        self.packed = None
        if recipe.data.packed:
            self.packed = Packed(dataset.train, dataset.train_starts, recipe.data.length, recipe.seed)
        self.wrapped: nn.Module = accelerator.prepare(Objective(self.model, recipe.data.chat), device_placement=[False])
        self.objective, self.captured = cast("Callable[..., Tensor]", self.wrapped), False
        self.step, self.elapsed, self.counted = at.step, at.elapsed, at.loss_count
        self.losses = torch.tensor(at.loss_sum, device=self.device)
        self.loss = math.nan  # in nats, as last measured
        self.norm, self.share, self.rate = torch.zeros(()), 0.0, 0.0
        self.started, self.mark = 0.0, (0, 0.0)  # on the clock: the run, and the last line in metrics.jsonl
        self.best = Best(self.out / BEST, resumed=at.step > 0)
        self.finished = self._progress() >= 1  # before this run of the program
        self.report: Report | None = None  # of the main process

    def go(self, console: Console) -> Path:
        with ExitStack() as stack:
            if self.accelerator.is_main_process:
                self.report = stack.enter_context(self._open_report(console))
                self._introduce(self.report)
            self._prepare_device()
            with Interrupts() as interrupts:
                self.started = time.monotonic() - self.elapsed
                self.mark = self.step, time.monotonic()
                stopped_by = self._loop(interrupts)
                place = self._save()
                if self.report:
                    setup.save_model(self.out / MODEL, self.recipe, self.model, self.tokenizer)
            if self.report and not stopped_by:
                self._conclude(self.report)
            elif self.report:
                for line in told.of_a_stopped_run(self.out, self.step, self._progress(), place):
                    self.report.say(line)
        self.accelerator.wait_for_everyone()
        if self.report and self.report.outlet.error and not self.report.outlet.hung_up:
            raise self.report.outlet.error
        if stopped_by == signal.SIGINT:
            raise KeyboardInterrupt
        if stopped_by:
            raise SystemExit(128 + stopped_by)
        return self.out

    def _prepare_device(self) -> None:
        """What a GPU needs before the first step: minutes on a new machine, in which nothing else would be said."""
        if self.device.type != "cuda":
            return
        graphs = self.recipe.graphs and not self.packed and self.accelerator.num_processes == 1
        if self.report:
            what = "compiling blocks and capturing a step in CUDA graphs" if graphs else "compiling kernels"
            self.report.say(f"{what}; the first step may take a minute")
        if graphs:
            sample = next(iter(self.dataset.windows(self.recipe.data, self.recipe.seed, 0))).to(self.device)
            portions = self.recipe.data.accumulate
            self.objective, self.captured = capture(self.wrapped, self.model, sample, self.bfloat16, portions)

    def _loop(self, interrupts: Interrupts) -> int:
        """Steps until the end of the run, or until a signal, which it returns."""
        stop, progress = 0, self._progress()
        while progress < 1 and not stop:
            self._train(progress)
            before, stop = progress, self._agree(interrupts.signal or self._hangup())
            progress = self._progress()
            if self.step % self.recipe.log_every == 0:
                self._log()
            if self.report:
                self.report.show(progress, self._in_bits(self.loss), self.rate, self._left(progress))
            if progress < 1 and not stop:
                if self._due(self.recipe.eval_every, before, progress):
                    self._glance(progress)
                if self._due(self.recipe.save_every, before, progress):
                    self._save()
        return stop

    def _train(self, progress: float) -> None:
        """One step."""
        recipe, ranks = self.recipe, self.accelerator.num_processes
        rank = self.accelerator.process_index
        torch.manual_seed(hash((recipe.seed, self.step, rank)))  # so that a layer's randomness follows from the step
        if self.packed:
            portions = list(self.packed.portions(recipe.data, self.step, rank, ranks))
        else:
            portions = [Portion(w) for w in self.dataset.windows(recipe.data, recipe.seed, self.step, rank, ranks)]
        for left, (tokens, cu_seqlens, share) in zip(reversed(range(len(portions))), portions, strict=True):
            given = [tokens.to(self.device, non_blocking=True), *([] if cu_seqlens is None else [cu_seqlens])]
            with self.accelerator.no_sync(self.wrapped) if left else nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                    loss = self.objective(*given) * (share / len(portions))
                self.accelerator.backward(loss)
            self.losses += loss.detach()
        self.norm = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.optim.clip or math.inf)
        self.share = schedule(recipe.optim, self.step, progress)
        set_learning_rate(self.optimizer, self.share)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.counted += 1

    def _progress(self) -> float:
        """The share of the run that is done; 1 or more at its end."""
        by_step = self.step / self.recipe.steps if self.recipe.steps else 0.0
        by_clock = self.elapsed / (60 * self.recipe.minutes) if self.recipe.minutes else 0.0
        return max(by_step, by_clock)

    def _due(self, every: int, before: float, now: float) -> bool:
        return self.step % every == 0 if every else int(_TIMES * now) > int(_TIMES * before)

    def _left(self, progress: float) -> float:
        """Seconds to the end of the run, if it goes on as it did."""
        return self.elapsed / progress * (1 - progress) if 0 < progress < 1 else 0.0

    def _hangup(self) -> int:
        """SIGPIPE, where nobody can read the report any more."""
        return _SIGPIPE if self.report and self.report.outlet.error else 0

    def _agree(self, received: int) -> int:
        """Read the clock; every process then has the same time, and stops at the same step for the same signal."""
        self.elapsed = time.monotonic() - self.started
        if self.accelerator.num_processes > 1:
            mine = torch.tensor([[self.elapsed, received]], dtype=torch.float64, device=self.device)
            self.elapsed, received = cast("Tensor", self.accelerator.gather(mine)).amax(0).tolist()
        return int(received)

    def _tokens(self, begin: int, end: int) -> int:
        """Tokens that the steps from ``begin`` to before ``end`` predict, over all processes."""
        data = self.recipe.data
        if self.packed:
            return sum(self.packed.predicted(data, step) for step in range(begin, end))
        return (end - begin) * data.batch * data.length

    def _mean_over_processes(self, value: Tensor) -> Tensor:
        return cast("Tensor", self.accelerator.reduce(value, "mean"))

    def _in_bits(self, loss: float) -> float:
        """Bits per byte of the text that is trained on, of a loss in nats per token."""
        trained = self.dataset.about["train"]
        return loss / math.log(2) * trained.get("learned", trained["tokens"]) / trained["bytes"]

    def _measure(self) -> None:
        """Loss and tokens per second over the steps since the last line in metrics.jsonl, if there are any."""
        if not self.counted:
            return
        loss = self._mean_over_processes(self.losses / self.counted).item()
        self._demand_finite(loss=loss)
        (step, at), self.loss = self.mark, loss
        self.rate = self._tokens(step, self.step) / (time.monotonic() - at)

    def _log(self) -> None:
        self._measure()
        self.losses, self.counted = torch.zeros_like(self.losses), 0
        self.mark = self.step, time.monotonic()
        if self.report:
            self.report.record(
                "train",
                self.step,
                self.elapsed,
                loss=self.loss,
                bits_per_byte=self._in_bits(self.loss),
                learning_rate=self.recipe.optim.lr * self.share,
                gradient_norm=self.norm.item(),
                tokens_per_second=round(self.rate),
            )

    def _glance(self, progress: float) -> None:
        """An evaluation on the way; the best model is kept."""
        self._measure()
        if self.report:
            began = time.monotonic()
            bits = self._bits_per_byte(_GLANCE)
            if not math.isfinite(bits + magnitude(self.model, self.optimizer).item()):
                self.losses.fill_(math.nan)  # then the next line or checkpoint ends the run, on all processes alike
                return
            self.report.record("held_out", self.step, self.elapsed, bits_per_byte=bits)
            self.best.offer(bits, self.step, self.model, self.tokenizer)
            measured = f"held-out{self._sample()} {bits:.3f}, training {self._in_bits(self.loss):.3f} bits per byte"
            pace = f"{self.rate:,.0f} tokens/s  {duration(self._left(progress))} left"
            self.report.say(f"step {self.step}  {progress:.0%}  {measured}  {pace}")
            self.mark = self.mark[0], self.mark[1] + time.monotonic() - began

    def _bits_per_byte(self, limit: int | None) -> float:
        with as_written(self.captured):
            return bits_per_byte(
                self.model,
                self.dataset,
                length=self.recipe.data.length,
                packed=self.recipe.data.packed,
                limit=limit,
                bfloat16=self.bfloat16,
            )

    def _save(self) -> Path | None:
        """Write a checkpoint of finite numbers; its place, on the main process."""
        began, norm = time.monotonic(), magnitude(self.model, self.optimizer)
        bits = self._bits_per_byte(_PROBE)
        own, checked = self.losses, self.losses + 0 * (norm + bits)  # NaN where one of the three is not finite
        self.losses = self._mean_over_processes(checked)
        loss_sum = self.losses.item()
        if not math.isfinite(loss_sum):
            self._demand_finite(loss=own.item(), norm_of_the_weights=norm.item(), held_out_loss=bits, mean=loss_sum)
        if not self.report:
            return None
        at = Position(self.step, self.elapsed, loss_sum, self.counted)
        folder = self.out / CHECKPOINTS
        place = save_checkpoint(folder, self.recipe, at, self.model, self.optimizer, self.tokenizer)
        self.mark = self.mark[0], self.mark[1] + time.monotonic() - began
        return place

    def _demand_finite(self, **numbers: float) -> None:
        if wrong := not_finite(**numbers):
            saved = checkpoints(self.out / CHECKPOINTS)
            where = f"goes on from {saved[-1].name}, where all was finite" if saved else "begins again"
            again = resuming(self.out, {"optim.lr": float(f"{self.recipe.optim.lr / 10:g}")})
            hint = f"learn more slowly, or raise optim.warmup: {again} {where}"
            raise DualformError(f"{wrong} at step {self.step}", hint=hint)

    def _open_report(self, console: Console) -> Report:
        setup.write_recipe(self.recipe)
        compressors = {key: self.dataset.about[key] for key in ("gzip", "xz")}
        return Report(self.out, self.step, console, compressors, self._name())

    def _name(self) -> str:
        given = self.recipe.model
        return given if isinstance(given, str) else f"model {self.model.config.pattern}"

    def _introduce(self, report: Report) -> None:
        """What is trained, on what, from where on."""
        recipe = self.recipe
        lines = list(told.about_the_text(recipe.data.path, self.dataset.about))
        if recipe.data.chat and self.dataset.train_starts is not None:
            lines += told.of_cut_conversations(self.dataset.train_starts, len(self.dataset.train), recipe.data.length)
        precision = "bfloat16" if self.bfloat16 else "float32"
        where = told.devices(self.device, self.accelerator.num_processes)
        lines.append(f"{self._name()}: {told.size(self.model)}, on {where}, {precision}")
        if self.finished:
            lines.append(told.of_a_finished_run(recipe, self.step))
        elif self.step:
            lines.append(f"resumed after step {self.step}")
        lines += [f"changed: {change}" for change in self.changed]
        if recipe.steps is not None:
            lines += told.of_a_long_warmup(recipe, recipe.steps)
        for line in lines:
            report.say(line)

    def _conclude(self, report: Report) -> None:
        """The last evaluation, on all held-out text, and the summary."""
        about = self.dataset.about
        bits, tokens = self._bits_per_byte(None), self._tokens(0, self.step)
        same = self._bits_per_byte(_GLANCE) if self._sample() else bits  # as those on the way
        self._demand_finite(held_out_loss=bits, held_out_sample=same)
        report.record("held_out", self.step, self.elapsed, bits_per_byte=bits)
        self.best.offer(same, self.step, self.model, self.tokenizer)
        summary = {
            "bits_per_byte": bits,
            "gzip": about["gzip"],
            "xz": about["xz"],
            "held_out_bytes": about["held_out"]["bytes"],
            "best": {"step": self.best.step, "bits_per_byte": self.best.bits},
            "parameters": self.model.parameter_count(),
            "steps": self.step,
            "tokens": tokens,
            "seconds": round(self.elapsed, 1),
        }
        with replacing_file(self.out / SUMMARY_FILE) as path:
            path.write_text(to_json(summary), encoding="utf-8")
        if not self.finished:
            trained = f"{self.step} steps, {amount(tokens, ' tokens')} in {duration(self.elapsed)}"
            report.say(f"{trained}; saved {self.out / MODEL}")
        if self.recipe.steps is None:
            for line in told.of_a_long_warmup(self.recipe, self.step):
                report.say(line)
        report.say(told.of_the_held_out(bits, about))
        report.say(told.of_the_best(self.best, same, self._sample()))

    def _sample(self) -> str:
        """`` sample`` where an evaluation on the way reads a part of the held-out text."""
        return " sample" if self.dataset.about["held_out"]["tokens"] > _GLANCE else ""
