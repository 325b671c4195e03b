"""What a run of kd-timm-train is made of, from its arguments: networks, data, optimizer, distillation, folder."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, LoggerType, broadcast_object_list
from timm.models import safe_model_name
from timm.task import ClassificationTask, TrainingTask
from timm.utils import CheckpointSaver, ModelEmaV3, random_seed
from torch import nn

from kd_accelerate import broadcast
from kd_accelerate.randomness import undisturbed
from kd_plugins import DistillError
from kd_plugins.errors import did_you_mean, told
from kd_plugins.evaluation import dirichlet_offset
from kd_plugins.states import slots, write_text
from kd_timm import build, data
from kd_timm.arguments import as_flag
from kd_timm.checkpoint import Checkpoints, Summary, find_state, output_folder
from kd_timm.compat import LOGGER_TYPE_TO_CLASS, native_scaler
from kd_timm.distillation import Distillation, make_distiller
from kd_timm.engine import PlainStep, TrainingRun
from kd_timm.evaluation import evaluator
from kd_timm.peers import Peers
from kd_timm.progress import Reporter

_logger = logging.getLogger("kd_timm.train")


class Parts(TrainingRun):
    """What a run is made of, ready to train.

    Args:
        args: Parsed arguments; what is derived from them (learning rate, number of classes) is filled in.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        needs = {"cache_teacher": "teacher", "ood_dataset": "val_split"}
        for name, needed in (needs | dict.fromkeys(("teacher", "peer", "distill_args"), "distill")).items():
            if getattr(args, name) and not getattr(args, needed):
                raise DistillError(f"{as_flag(name)} does nothing without {as_flag(needed)} NAME: give both.")
        self.accelerator = accelerator = create_accelerator(args)
        self.primary, self.processes = accelerator.is_main_process, accelerator.num_processes
        if self.processes > 1:
            which = f"Process {accelerator.process_index}, total {self.processes}, device {accelerator.device}."
            _logger.info(f"Training in distributed mode with multiple processes, 1 device per process.{which}")
        else:
            _logger.info(f"Training with a single process on 1 device ({accelerator.device}).")
        if not self.primary:
            # What the first process tells of the run, timm's own lines included.
            for name in ("kd_timm", "timm"):
                logging.getLogger(name).setLevel(logging.ERROR)
        if args.model_dtype == "float16":
            _logger.warning("float16 is not recommended for training, for half precision bfloat16 is recommended.")
        # A file is a checkpoint of timm's script, a folder what this one leaves.
        self.checkpoint = args.resume if os.path.isfile(args.resume) else None
        if self.checkpoint and args.distill:
            raise DistillError(
                f"--resume {args.resume} is a checkpoint of timm's, which holds no state of a method: begin with its"
                " weights, --initial-checkpoint, or name the output folder of a run."
            )
        self.state = None if self.checkpoint else find_state(args)
        # As it comes back from a file: JSON has no tuples.
        self.given = json.loads(json.dumps(vars(args)))
        with undisturbed(gpu=True):
            # The run's own is made once its random streams have begun.
            tried = make_distiller(args) if args.distill else None
        # What tells of uncertainty without a softmax, tells so whatever the number of classes.
        if args.ood_dataset and not softmax(args) and dirichlet_offset(tried, args.num_classes or 2) is None:
            flag = "--task multilabel" if args.task == "multilabel" else "--loss bce"
            raise DistillError(f"--ood-dataset reads the uncertainty of a softmax, and {flag} trains none: drop one.")
        data_free = tried is not None and not tried.data
        if data_free:
            data.check_data_free(args)
        data.apply_data_defaults(args, data_free)
        random_seed(args.seed, accelerator.process_index)
        self.student, config = build.create_student(args, verbose=self.primary)
        self.student.to(accelerator.device)
        # The processes draw from streams of their own; the moving average is copied before DDP would make them agree.
        broadcast(self.student.state_dict().values())
        build.place(self.student, args, accelerator.device)
        if args.sync_bn and self.processes > 1:
            args.dist_bn = ""
            _logger.info(
                "Converted model to use Synchronized BatchNorm. WARNING: You may have issues if using zero initialized"
                " BN layers (enabled by default for ResNets) while sync-bn enabled."
            )
        if not args.naflex_loader:
            build.check_size(self.student, args, config, accelerator.device)
        if args.amp:
            _logger.info("Using native Torch AMP. Training in mixed precision.")
        else:
            _logger.info(f"AMP not enabled. Training in {data.model_dtype(args)}.")
        datasets = data.create_datasets(args, config["input_size"][0], data_free)
        data.check_labels(args, datasets)
        # Before any hook is set, so that the copy has none.
        self.ema = create_average(args, self.student) if args.model_ema else None
        self.distillation: Distillation | None = None
        if args.distill:
            with undisturbed(gpu=True):
                self.distillation = Distillation(args, self.student, config, datasets, accelerator.device)
            if self.distillation.cache is None:
                self.distillation.set_up(datasets.train, fresh=self.state is None and self.primary)
        self.reporter = Reporter(self.primary)
        if data_free and datasets.evaluation is not None:
            named = f"{args.dataset or args.data_dir} ({args.val_split})"
            self.reporter.line(f"{args.distill} trains without data: {named} is for the evaluation alone.")
        self.seconds, self.updates, self.described = 0.0, 0, False
        self.told: list[dict[str, Any]] = []
        self._begin(datasets, config)
        self._open_output()
        if self.accelerator.log_with:
            self._start_trackers()

    def _begin(self, datasets: data.Datasets, config: dict[str, Any]) -> None:
        """Builds what the training loop works with."""
        args, accelerator, distillation = self.args, self.accelerator, self.distillation
        self.data = data.create_data(
            args,
            config,
            datasets,
            accelerator.device,
            distiller=None if distillation is None else distillation.distiller,
            patch_size=getattr(self.student, "get_patch_size", lambda: (16, 16))(),
        )
        # A training without data keeps its last student, whatever an evaluation set says of it. So does one without an
        # evaluation: stages, temperatures and critics change what a method's loss is, and the lowest is no better.
        judged = self.data.evaluation is not None and (datasets.train is not None or args.best_on_eval)
        self.metric = args.eval_metric if judged else "loss" if distillation is None else "epoch"
        if judged and self.metric not in evaluator(args).metric_names:
            names = ", ".join(evaluator(args).metric_names)
            raise DistillError(f"--eval-metric {self.metric} is not measured here: expected one of {names}.")
        build.resolve_learning_rate(args, self.processes, self.data.mean_batch)
        timms = args.recovery_interval or self.checkpoint or args.checkpoint_format == "both"
        if timms and args.model_ema and args.kd_distill_type == "feature":
            raise DistillError(
                "--model-ema follows the student alone, and timm's checkpoints of --kd-distill-type feature hold the"
                " average of its projection too: leave --recovery-interval and --checkpoint-format out, and name an"
                " output folder to --resume."
            )
        self.criterion = build.create_criterion(args).to(accelerator.device)
        self.task = build.create_task(args, self.student, self.criterion, accelerator.device)
        if self.task is None and distillation is None:
            # What such a run is a case of, without being one: the line names the loss.
            _logger.info(f"ClassificationTask: criterion={type(self.criterion).__name__}")
        model: Any = self.student if self.task is None else self.task.get_trainable_module()
        optimizer = build.create_optimizer(args, model)
        defaults = optimizer.defaults | {"weight_decay": args.weight_decay}
        told_of = ", ".join(f"{key}: {value}" for key, value in defaults.items())
        self.reporter.line(f"Created {type(optimizer).__name__} ({args.opt}) optimizer: {told_of}")
        self.updates_per_epoch = -(-len(self.data.train) // args.grad_accum_steps)
        self.scheduler, self.epochs = build.create_scheduler(
            args, optimizer, self.updates_per_epoch, decreasing=self.metric in ("loss", "epoch")
        )
        counted = "(epochs + cooldown_epochs). Warmup within epochs when warmup_prefix=False."
        if args.warmup_prefix:
            counted = "(warmup_epochs + epochs + cooldown_epochs). Warmup added to total when warmup_prefix=True."
        stepped = f"LR stepped per {'update' if args.sched_on_updates else 'epoch'}"
        stepped = "Constant LR" if self.scheduler is None else stepped
        self.reporter.line(f"Scheduled epochs: {self.epochs} {counted} {stepped}.")
        for flag, asked in (("--stop-epoch", [args.stop_epoch or 1]), ("--save-epochs", args.save_epochs)):
            if max(asked, default=1) > self.epochs:
                raise DistillError(f"{flag}: expected at most the {self.epochs} epochs of the run, got {max(asked)}.")
        if distillation is not None:
            if distillation.cache is not None:
                distillation.fill(self, self.epochs, datasets.train)
            model = distillation.network.staged
            distillation.schedule(self.epochs, self.updates_per_epoch)
        if args.torchscript:
            # The script shares the student's weights; Accelerate wraps the forward of a module that is none.
            model = nn.Sequential(torch.jit.script(model))
        if args.torchcompile:
            _logger.info(f"Compiling task components with backend={args.torchcompile}, mode={args.torchcompile_mode}")
            with told("--torchcompile", RuntimeError):
                model = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
        if self.processes > 1:
            _logger.info("Preparing task for distributed training")
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if distillation is None:
            # The loss is computed in the precision of the scores, as in timm's script.
            accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.task is not None:
            self.task.trainable_module = self.model
        self.step = PlainStep(self)
        if distillation is not None:
            distillation.begin(self)
            self.new_schedule()

    @property
    def stage_start(self) -> int:
        """First epoch of the learning-rate schedule: of the run, or of the current stage of the distillation."""
        return 0 if self.distillation is None else self.distillation.stage_epochs(self.updates_per_epoch)[0]

    @property
    def student_start(self) -> int:
        """First epoch of the student: of the run, or of the last stage that began with a fresh one."""
        if self.distillation is None:
            return 0
        table = self.distillation.table
        begun = table.stages[: self.distillation.distiller.progress.stage + 1]
        fresh = (start for start, stage in zip(table.starts, begun, strict=False) if stage.fresh_student)
        return max(fresh, default=0) // self.updates_per_epoch

    def new_schedule(self) -> None:
        """Gives the current stage a learning-rate curve of its own; a run of one stage keeps the curve of the run."""
        assert self.distillation is not None
        if len(self.distillation.table.stages) == 1:
            return
        optimizer = self.optimizer.optimizer
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        start, end = self.distillation.stage_epochs(self.updates_per_epoch)
        part, decreasing = build.of_stage(self.args, end - start, self.epochs), self.metric in ("loss", "epoch")
        self.scheduler = build.create_scheduler(part, optimizer, self.updates_per_epoch, decreasing=decreasing)[0]

    def enter_stage(self) -> None:
        """Begins the stage of the coming epoch, where the distillation gets to one."""
        stage = None if self.distillation is None else self.distillation.player.enter_stage()
        if stage is None:
            return
        self.reporter.line(f"Stage {stage.name!r} begins" + (" with a fresh student" if stage.fresh_student else ""))
        self.new_schedule()
        if stage.fresh_student:
            self.checkpoints.restart()
            self.told.clear()
            if self.ema is not None:
                self.ema.set(self.student)

    @property
    def evaluated(self) -> nn.Module:
        """The bare model that is exported, on whose evaluation the best epoch is chosen: the moving average if any."""
        return self.student if self.ema is None or self.args.model_ema_force_cpu else self.ema.module

    def saved_task(self) -> TrainingTask:
        """The student, its moving average and timm's distillation, as timm's checkpoints hold them."""
        task = self.task or ClassificationTask(self.student, self.criterion, verbose=False)
        if self.ema is not None:
            task.trainable_module_ema = self.ema
        return task

    def _open_output(self) -> None:
        args, folder = self.args, None
        if self.primary:
            folder, before = output_folder(args), None if self.state is None else self.state.parent
            if before and not args.experiment and (not args.output or before.resolve().parent == folder.resolve()):
                folder = before
            elif not args.experiment:
                size = self.data.config["input_size"][-1]
                stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
                folder /= f"{stamp}-{safe_model_name(args.model)}-{size}"
            if (folder / "run.json").is_file() and self.state is None:
                _logger.warning(f"{folder} holds an earlier run, whose files this one replaces.")
            with told(f"--output: {folder} cannot be made", OSError, remedy="name a folder that can be written"):
                folder.mkdir(parents=True, exist_ok=True)
        self.folder: Path = broadcast_object_list([folder])[0]
        self.checkpoints = Checkpoints(self.folder, args.checkpoint_hist, self.metric == "loss")
        peers = [] if self.distillation is None else self.distillation.peers
        self.summary = Summary(self.folder / "summary.csv")
        self.peers = Peers(args.peer, peers, self.folder, self.metric)
        self.saver = None
        if self.primary and (args.recovery_interval and not args.distill or args.checkpoint_format == "both"):
            self.saver = CheckpointSaver(
                self.student,
                self.optimizer.optimizer,
                argparse.Namespace(**self.given),
                amp_scaler=native_scaler(self.accelerator.scaler),
                checkpoint_dir=str(self.folder),
                recovery_dir=str(self.folder),
                decreasing=self.metric == "loss",
                max_history=args.checkpoint_hist,
                task=self.saved_task(),
            )
        if self.primary and not slots(self.folder)[1].is_dir():
            self.describe()

    def _start_trackers(self) -> None:
        """Starts the accelerator's trackers; those that write files write to `logs` in the run's folder."""
        args, accelerator = self.args, self.accelerator
        accelerator.project_configuration.logging_dir = str(self.folder / "logs")
        wandb: dict[str, Any] = {"name": self.folder.name, "tags": args.wandb_tags}
        if args.wandb_resume_id:
            wandb |= {"id": args.wandb_resume_id, "resume": "must"}
        # Trackers take numbers and text alone.
        plain = (bool, int, float, str, type(None))
        config = {key: value if isinstance(value, plain) else str(value) for key, value in self.given.items()}
        names = ", ".join(map(str, accelerator.log_with))
        remedy = "mend that, or leave --report-to and --log-wandb out."
        # Whatever a tracker raises (no account, no server), the remedy is the same.
        with told(f"The trackers {names} cannot start", Exception, remedy=remedy):
            accelerator.init_trackers(args.wandb_project or "kd-timm-train", config, {"wandb": wandb})

    def describe(self) -> None:
        """Writes `args.yaml` and `config.json`; beside the state of a run before, only once there is one of this."""
        if self.described:
            return
        write_text(self.folder / "args.yaml", yaml.safe_dump({**self.given, "config": "", "resume": ""}))
        networks = {"config": self.student} | dict(zip(self.peers.labels, self.peers.modules, strict=True))
        for name, network in networks.items():
            self.checkpoints.describe(network, self.data.config, self.data.classes, name)
        self.described = True


def softmax(args: argparse.Namespace) -> bool:
    """Whether the classes of an image exclude each other in the loss, so that its softmax says something."""
    return args.task == "classification" and args.loss != "bce"


def create_average(args: argparse.Namespace, student: nn.Module) -> ModelEmaV3:
    """The moving average of a student's weights, where and in the precision that `--model-ema` and its like say."""
    half = data.model_dtype(args) == torch.float16 or (args.model_ema_force_fp32 and args.model_dtype == "bfloat16")
    return ModelEmaV3(
        student,
        decay=args.model_ema_decay,
        use_warmup=args.model_ema_warmup,
        device=torch.device("cpu") if args.model_ema_force_cpu else None,
        dtype=torch.float32 if half else None,
        stochastic_rounding_seed=args.seed,
    )


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    """Device, precision and processes, from the flags of the device and the launcher's environment."""
    for module in args.device_modules:
        with told(f"--device-modules {module} cannot be imported", ImportError):
            importlib.import_module(module)
    if "WORLD_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    kind, _, index = args.device.partition(":")
    if index and not index.isdecimal():
        raise DistillError(f"--device: expected the number of a device after the colon, got {args.device}.")
    if kind == "cuda" and not torch.cuda.is_available():
        _logger.info("No GPU is available: training on the CPU (say so with --device cpu).")
        kind = "cpu"
    if kind == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        if index:
            torch.cuda.set_device(int(index))
    precision = {"float16": "fp16", "bfloat16": "bf16"}[args.amp_dtype] if args.amp else "no"
    if precision == "fp16" and kind == "cpu":
        if args.distill:
            raise DistillError("--amp in float16 needs a GPU to scale the loss on: add --amp-dtype bfloat16.")
        # Accelerate has no such thing; the loss is not scaled, as in timm's script.
        precision = "no"
    accelerator = Accelerator(
        cpu=kind == "cpu",
        mixed_precision=precision,
        log_with=tracker_names(args) or None,
        project_dir=".",
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=not args.no_ddp_bb)],
    )
    if accelerator.device.type != kind:
        raise DistillError(
            f"--device: expected cuda, cuda:N or cpu, or {accelerator.device.type}, which is here, got {args.device}."
        )
    if args.sync_bn and kind == "cpu" and accelerator.num_processes > 1:
        raise DistillError("--sync-bn needs GPUs: leave it out, --dist-bn averages the statistics after each epoch.")
    return accelerator


def tracker_names(args: argparse.Namespace) -> list[str]:
    """The trackers that the arguments name.

    Raises:
        DistillError: One is unknown or not installed, or an option of wandb stands without it.
    """
    names = list(dict.fromkeys([*args.report_to, *(["wandb"] if args.log_wandb else [])]))
    if not {"wandb", "all"} & set(names):
        given = [name for name in ("wandb_project", "wandb_tags", "wandb_resume_id") if getattr(args, name)]
        if given:
            raise DistillError(f"{as_flag(given[0])} does nothing without wandb: add --log-wandb.")
    for name in names:
        if name != "all" and name not in LOGGER_TYPE_TO_CLASS:
            hint = did_you_mean(name, LOGGER_TYPE_TO_CLASS)
            raise DistillError(f"--report-to {name}: Accelerate has no such tracker.{hint}")
        if name in LoggerType and name not in map(str, get_available_trackers()) and name != "all":
            raise DistillError(f"--report-to {name}: that tracker is not installed: pip install {name}.")
    return names
