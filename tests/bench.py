"""How fast a training step is, against the floor of its own network: `make bench` and `make bench-data`.

    python tests/bench.py --arch resnet10 --stem imagenet --batch 256                       # every method: step, floor, ratio, split
    python tests/bench.py --methods npid --npid "--dim 512 --negatives 4096" --steps 10
    python tests/bench.py --batches 64,128,256,512,1024 --figure batches.png               # images/s over the batch size, drawn (matplotlib)
    python tests/bench.py --tricks --methods simclr                                        # images/s without each trick of the step
    python tests/bench.py --banks 50000,200000,1280000 --dim 128                           # NPID's losses and update over the bank's size;
                                                                                           # for memory on a CPU one bank and --negatives a call
    python tests/bench.py --peer "python their_step.py"                                    # its last line: images/s, as a number
    python tests/bench.py --predict --arch resnet18 --stem cifar --batch 512                # launches, bytes and FLOPs of a step, and from these
                                                                                           # a predicted time on two GPUs: no measurement
    python tests/bench.py --photos DIR --arch resnet50 --batch 32                          # decode, cache, transfer, augment, network

step: median time of the real training loop's step, all that train() does between two updates included, on resident images.
floor: forward and backward of the same network on as many resident random views, at the same precision; with the target network's forward
pass for momentum methods, the gradient of the images for a fusion, and the three products of embeddings and bank rows for NPID. The
optimizer is in the step, not in the floor. On a CPU steps and floors alternate, and the ratio is the median of neighbouring ones.
The split is taken in a second pass, in which every part waits for the device. monitor: what the online kNN takes of the time between two of
them, at the default of one in five epochs. peak_GB: on a CPU of the process up to then, so it is a method's own where it is the first of a
call. Each line of the table is also a JSON line in --out.
"""
import argparse
import collections
import functools
import importlib
import itertools
import json
import operator
import pathlib
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common  # noqa: E402
import npid_distill  # noqa: E402
from linear_probe import markdown, pyplot  # noqa: E402

# name -> script and flags
METHODS = {
    "simclr": ("bassl", ["--layers", "0"]), "simclr + fusion": ("bassl", []), "moco": ("bassl", ["--layers", "0", "--framework", "moco"]),
    "npid": ("npid_distill", []), "npid ema": ("npid_distill", ["--update", "ema"]),
    "byol": ("aug_study", ["--methods", "byol"]), "simsiam": ("aug_study", ["--methods", "simsiam"]), "barlow": ("aug_study", ["--methods", "barlow"]),
    "vicreg": ("aug_study", ["--methods", "vicreg"]), "swav": ("aug_study", ["--methods", "swav"]), "dino": ("aug_study", ["--methods", "dino"]),
}
LOSSES = {"bassl": ["nt_xent", "info_nce", "cosine_loss"], "npid_distill": ["dense_losses", "chunked_losses"],
          "aug_study": ["nt_xent", "info_nce", "cosine_loss", "barlow_loss", "vicreg_loss", "swav_loss", "dino_loss"]}


# ------------------------------------------------------------------------------------------- operators


class _Operators(TorchDispatchMode):
    """Counts what would be launched on a GPU, and the bytes read and written: every operator on tensors but views of storage and bare
    allocations. Random numbers are drawn on the host, and are not counted either."""

    FREE = ("aten::empty", "aten::new_empty", "aten::rand", "aten::_unsafe_view", "aten::detach", "aten::promote_types", "prim::")

    def __init__(self):
        super().__init__()
        self.names, self.bytes = collections.Counter(), 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        view = any(value.alias_info is not None and not value.alias_info.is_write for value in operator._schema.returns)
        if not view and not operator.name().startswith(self.FREE):
            self.names[operator.name()] += 1
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
            if operator.name().startswith(("aten::index.", "aten::index_select", "aten::index_copy_", "aten::gather")):  # touch the rows that are asked for alone
                tensors = [tensors[-2 if "copy" in operator.name() else -1]] * 2
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return result


def count_operators(function) -> tuple[int, int]:
    """(operators launched, bytes moved) by the forward pass of a call."""
    with torch.no_grad(), _Operators() as counted:
        function()
    return sum(counted.names.values()), counted.bytes


def npid_step(bank: npid_distill.MemoryBank, update: str, negatives: int, z, index, partner, weight, product: torch.dtype = torch.float32):
    """The losses of one step as npid_distill.train has them, and a function that updates the bank; product: the type of the products."""
    columns, own, repeated = bank.in_play(index, negatives)
    own = torch.stack([own, own[partner]], 1)
    rows = bank.rows.index_select(0, columns)
    ce, kl, prob = npid_distill.dense_losses(z, rows.to(product), own, weight, repeated, 0.2, 0.5, False)
    if update == "grad":
        return ce + 20 * kl, lambda: bank.update(index, z.to(product), prob, weight, columns, own, rows)
    return ce + 20 * kl, lambda: bank.update(torch.stack([index, index[partner]], 1), z, None, weight)


# Published peaks: dense bf16 FLOP/s, bytes/s of memory (NVIDIA data sheets, SXM). Assumed: the network at 20 % of the peak, which is what NVIDIA's
# published training rate of ResNet-50 on an A100 comes to (2,470 images/s in mixed precision, DeepLearningExamples, of 24.3 GFLOP each); NPID's
# products at 40 %; the rest at 70 % of the bandwidth, 4 microseconds a launch where that is longer.
GPUS = {"A100": (312e12, 2.0e12), "H100": (989e12, 3.35e12)}


def predict(name: str, arch: str, stem: str, batch: int, size: int, dim: int) -> dict:
    """Launches and bytes of a step outside the network, the network's FLOPs, and from these a predicted step time. Forward passes are
    counted; backward passes are taken as twice the forward's FLOPs and, for the losses, bytes and launches."""
    import aug_study
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    script, flags = METHODS[name]
    method = aug_study.METHODS.get(name)
    augmentation = aug_study.AUGMENTATIONS[method.aug if script == "aug_study" else "simclr"]
    views = 1 if script == "npid_distill" else 2
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    first, second, local = (common.BatchAugment(s, **options) for s, options in
                            ((size, augmentation.first), (size, augmentation.second), (aug_study.local_size(size), augmentation.local)))

    def augment():
        if augmentation.first == augmentation.second or views == 1:
            first(images, views=views)
        else:
            first(images), second(images)
        if augmentation.locals:
            local(images, views=augmentation.locals)

    if script == "npid_distill":
        bank = npid_distill.MemoryBank(50_000, dim)
        z, index, partner = F.normalize(torch.randn(batch, dim), dim=1), torch.randperm(50_000)[:batch], torch.randperm(batch)
        loss = functools.partial(npid_step, bank, "ema" if "ema" in name else "grad", 10_000, z, index, partner, torch.full((batch, 2), 0.5), torch.bfloat16)
        update, pairs, product = loss()[1], 1, 3 * 2 * batch * dim * (10_000 + batch)
    else:
        width = 2048 if name in ("simsiam", "barlow", "vicreg", "dino") else 512 if name == "swav" else 256 if name == "byol" else 128
        z1, z2, queue = torch.randn(batch, width), torch.randn(batch, width), torch.randn(4096, width)
        update, product = (lambda: None), 0
        loss = (lambda: method.loss(z1, z2, queue[:1] if name == "dino" else queue)) if method else (lambda: aug_study.nt_xent(z1, z2))
        pairs = 1 if script == "bassl" or method.target_gradient else 2 + 2 * augmentation.locals
    with FakeTensorMode(), FlopCounterMode(display=False) as flops:
        encoder = common.resnet(arch, stem)
        encoder(torch.randn(batch, 3, size, size))
        one_view = flops.get_total_flops()
        if augmentation.locals:
            encoder(torch.randn(batch, 3, aug_study.local_size(size), aug_study.local_size(size)))
        small = flops.get_total_flops() - one_view
    momentum = name == "moco" or (method is not None and method.momentum > 0)
    network = 3 * (views * one_view + augmentation.locals * small) + (views * one_view if momentum else 0)
    network -= 3 * one_view + one_view if name == "moco" else 0  # one query view, one key view
    (launches, moved), (loss_launches, loss_moved), (bank_launches, bank_moved) = map(count_operators, (augment, loss, update))
    row = {"method": name, "batch": batch, "augmentation launches": launches, "GB": round(moved / 1e9, 2), "loss launches": pairs * loss_launches,
           "loss GB": round(pairs * loss_moved / 1e9, 2), "bank launches": bank_launches, "bank GB": round(bank_moved / 1e9, 2),
           "network TFLOP": round(network / 1e12, 2)}
    for gpu, (peak, bandwidth) in GPUS.items():
        outside = [max(n * 4e-6, size_ / (0.7 * bandwidth)) for n, size_ in
                   ((launches, moved), (3 * pairs * loss_launches, 3 * pairs * loss_moved), (bank_launches, bank_moved))]
        step = network / (0.2 * peak) + product / (0.4 * peak) + sum(outside)
        row |= {f"{gpu} ms, predicted": round(1e3 * step, 1), f"{gpu} outside %": round(100 * sum(outside) / step, 1)}
    return row


# ------------------------------------------------------------------------------------------- steps


class Done(BaseException):
    """Leaves a training loop after enough steps."""


def wait(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def train_for(name: str, flags: list[str], steps: int, warm: int, prepare=lambda run, script: None,
              beside=None) -> tuple[common.Run, list[float], list[float]]:
    """Run a method's own train() for warm + steps steps, with prepare(run, script) before the first update. beside(run) gives a function to call
    after every step. Returns the run, the seconds of each of the last steps, and those of every call beside them."""
    script_name, own = METHODS[name]
    script, runs, after, starts, ends = importlib.import_module(script_name), [], [], [], []

    def optimise(run, loss, optimise=common.Run.optimise):
        if not runs:
            runs.append(run)
            prepare(run, script)
            after.extend([beside(run)] if beside else [])
        optimise(run, loss)
        # On a GPU with nothing beside the steps one wait at either end, so that the host runs ahead as in training.
        ends.append(wait(run.device) if after or run.device.type != "cuda" or len(ends) in (warm - 1, warm + steps - 1) else None)
        for function in after:
            function()
        starts.append(wait(run.device) if after else time.perf_counter())
        if len(ends) == warm + steps:
            raise Done

    with tempfile.TemporaryDirectory() as out:
        real, common.Run.optimise = common.Run.optimise, optimise
        try:
            script.train(common.parse(script.Config, "", [*flags, *own, "--epochs", "1000", "--knn-every", "0", "--out", out]))
        except Done:
            pass
        finally:
            common.Run.optimise = real
    if ends[-2] is None:
        return runs[0], [(ends[-1] - ends[warm - 1]) / steps] * steps, []
    return runs[0], [end - start for start, end in zip(starts[warm - 1:], ends[warm:])], [start - end for start, end in zip(starts, ends)]


def split(name: str, flags: list[str], steps: int) -> dict[str, float]:
    """Seconds per step by part, each timed with a wait before and after it."""
    seconds, patched, stack, done, warm = collections.Counter(), [], [], itertools.count(1), 2

    def forget_warm_up():
        if next(done) <= warm:
            seconds.clear()

    def timed(part, function, device):
        @functools.wraps(function)
        def wrapper(*args, **options):
            began = wait(device)
            stack.append(0.0)
            result = function(*args, **options)
            spent = wait(device) - began
            seconds[part] += spent - stack.pop()  # without the parts inside it
            if stack:
                stack[-1] += spent
            return result
        return wrapper

    def prepare(run, script):
        module = run.model["framework"] if isinstance(run.model, torch.nn.ModuleDict) else run.model
        targets = [("network", type(module), "forward"), ("augmentation", common.BatchAugment, "forward"), ("network", torch.Tensor, "backward"),
                   ("optimizer", type(run.optimizer), "step"), *[("loss", script, loss) for loss in LOSSES[script.__name__]]]
        if script is npid_distill:
            targets += [("bank", npid_distill.MemoryBank, method) for method in ("in_play", "update", "update_in_chunks")] + [("augmentation", script, "cutmix")]
        if isinstance(run.model, torch.nn.ModuleDict):
            targets.append(("fusion", type(run.model["fusion"]), "forward"))
        for part, owner, attribute in targets:
            patched.append((owner, attribute, getattr(owner, attribute)))
            setattr(owner, attribute, timed(part, getattr(owner, attribute), run.device))

    try:
        _, times, _ = train_for(name, flags, steps, warm, prepare, lambda run: forget_warm_up)
    finally:
        for owner, attribute, function in reversed(patched):
            setattr(owner, attribute, function)
    parts = {part: spent / steps for part, spent in seconds.items()}
    return parts | {"rest": max(0.0, statistics.mean(times) - sum(parts.values()))}


def floor(name: str, run: common.Run):
    """A function that does the network's part of a step alone: forward and backward on random views, and what else the method needs."""
    model = run.model["framework"] if isinstance(run.model, torch.nn.ModuleDict) else run.model
    batch, dtype, views = run.batch, run.dtype, {"npid_distill": 1, "bassl": 1 if name == "moco" else 2, "aug_study": 2}[run.method]
    image = lambda n, size: torch.randn(n * batch, 3, size, size, device=run.device).to(memory_format=torch.channels_last)  # noqa: E731
    if run.method == "npid_distill":
        online, local, target = model, None, None
        rows = torch.randn(min(run.cfg.negatives or len(run.images), len(run.images)), run.cfg.dim, device=run.device).to(dtype)
        scores = torch.randn(batch, len(rows), device=run.device).to(dtype)
    else:
        import aug_study

        online = torch.nn.Sequential(model.encoder, model.projector, getattr(model, "predictor", torch.nn.Identity()))
        target = getattr(model, "target", None)
        local = aug_study.AUGMENTATIONS[run.cfg.augs or aug_study.METHODS[name].aug].locals if run.method == "aug_study" else 0
    x, small = image(views, run.size), image(local, aug_study.local_size(run.size)) if local else None
    x.requires_grad_(run.method == "bassl" and run.cfg.layers > 0)  # a fusion that learns needs the gradient of the images

    def one_step():
        with run.autocast():
            z = online(x)
            loss = z.float().square().mean() + (online(small).float().square().mean() if local else 0)
            if target is not None:
                with torch.no_grad():
                    target(x)
        if run.method == "npid_distill":
            z = z.detach().to(dtype)
            _ = z @ rows.T, scores @ rows, scores.T @ z  # cosines, their gradient, the rows' update
        loss.backward()
        model.zero_grad(set_to_none=True)
        x.grad = None

    return one_step


def network_alone(arch: str, stem: str, x: torch.Tensor):
    """A function that takes views x (B, 3, H, H) forward and backward through an encoder of its own."""
    encoder, dtype = common.resnet(arch, stem).to(x.device, memory_format=torch.channels_last), common.pick_dtype("auto", x.device)
    x = x.contiguous(memory_format=torch.channels_last)

    def one_step():
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
            z = encoder(x)
        z.float().square().mean().backward()
        encoder.zero_grad(set_to_none=True)

    return one_step


def setting(name: str, run: common.Run) -> dict:
    """What was run, as the first columns of a row."""
    return {"method": name, "network": f"{run.cfg.arch}, {run.stem} stem, {run.size} px", "batch": run.cfg.batch,
            "precision": str(run.dtype).removeprefix("torch.")}


def bench(name: str, flags: list[str], steps: int, device: torch.device) -> dict:
    on_gpu = device.type == "cuda"
    run, times, floors = train_for(name, flags, steps, 3, beside=None if on_gpu else functools.partial(floor, name))
    if on_gpu:
        network = floor(name, run)
        for _ in range(3):
            network()
        began = wait(run.device)
        for _ in range(steps):
            network()
        floors = [(wait(run.device) - began) / steps] * steps
    step, least = statistics.median(times), statistics.median(floors[-steps:])
    ratio = statistics.median(f / t for f, t in zip(floors[-steps:], times))
    began = wait(run.device)
    run.monitor()
    monitor = wait(run.device) - began
    parts = split(name, flags, max(2, steps // 2))
    memory = torch.cuda.max_memory_allocated(run.device) if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**setting(name, run), "images_per_s": round(run.cfg.batch / step, 1), "step_ms": round(1e3 * step, 1), "floor_ms": round(1e3 * least, 1), "floor/step": round(ratio, 3),
            **{f"{part} %": round(100 * spent / sum(parts.values()), 1) for part, spent in sorted(parts.items())},
            "monitor %": round(100 * monitor / (monitor + common.RunConfig.knn_every * run.steps_per_epoch * step), 1),
            "peak_GB": round(memory / 1e9, 2), "device": common.device_name(run.device), "torch": torch.__version__}


# Changes that take one trick away, and one that adds what is not a default: flags, or a change at the first update of a run.
CHANGES = {
    "without channels_last": lambda run, script: run.model.to(memory_format=torch.contiguous_format),
    "without bf16": ["--amp", "off"],
    "without the fused optimizer": lambda run, script: [group.update(fused=False, foreach=False) for group in run.optimizer.param_groups],
    "views augmented one by one": lambda run, script: setattr(common.BatchAugment, "forward", _one_by_one),
    "with torch.compile": ["--compile"],
}


def _one_by_one(self, images, generator=None, views=1, forward=common.BatchAugment.forward):
    return torch.cat([forward(self, images, generator) for _ in range(views)])


def bench_tricks(name: str, flags: list[str], steps: int) -> list[dict]:
    """Images/s as it is, and with each of CHANGES. A machine's speed drifts by more than most tricks bring, so every step is followed by one of
    the bare encoder, which no change touches, and gains are of their ratio. start_s: seconds until the third step is done, with compilation."""
    rows, forward = [], common.BatchAugment.forward

    def encoder(run):
        return network_alone(run.cfg.arch, run.stem, torch.randn(2 * run.batch, 3, run.size, run.size, device=run.device))

    def row(change, extra=(), prepare=lambda run, script: None):
        began = time.perf_counter()
        run, times, spent = train_for(name, [*flags, *extra], steps, 3, prepare, encoder)
        whole = time.perf_counter() - began
        rows.append({**setting(name, run), "change": change, "images_per_s": round(run.cfg.batch / statistics.median(times), 1),
                     "step/encoder": round(statistics.median(map(operator.truediv, times, spent[-steps:])), 3),
                     "start_s": round(whole - sum(times) - sum(spent), 1), "device": common.device_name(run.device), "torch": torch.__version__})

    for name_of_change, change in CHANGES.items():
        row("")
        row(name_of_change, *([change] if isinstance(change, list) else [[], change]))
        common.BatchAugment.forward = forward
    row("")
    as_it_is = statistics.median(r["step/encoder"] for r in rows if not r["change"])
    for r in rows:
        r["speed against as it is, %"] = round(100 * (as_it_is / r["step/encoder"] - 1), 1)
    return rows


class Memory:
    """Bytes that a block takes on top of what was there: of the device's allocator, or on a CPU of the process, looked at every 5 ms."""

    def __init__(self, device: torch.device):
        self.device, self.over = device, threading.Event()

    def now(self) -> int:
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return self
        self.before = self.peak = self.now()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self):
        while not self.over.wait(0.005):
            self.peak = max(self.peak, self.now())

    def __exit__(self, *_):
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self.over.set()
            self.watcher.join()
        self.bytes = self.peak - self.before


def bench_bank(rows: int, dim: int, batch: int, negatives: int, steps: int, device: torch.device) -> dict:
    """NPID's losses, their gradient and the update on a bank of random rows; negatives 0 = all of them."""
    bank = npid_distill.MemoryBank(1, dim).to(device)
    bank.rows = torch.cat([F.normalize(torch.randn(n, dim, device=device), dim=1) for n in [len(piece) for piece in torch.empty(rows).split(100_000)]])
    weight, times, on_top = torch.full((batch, 2), 0.5, device=device), [], 0
    for _ in range(steps + 1):
        z = F.normalize(torch.randn(batch, dim, device=device), dim=1).requires_grad_()
        index, partner = torch.randint(rows, (batch,), device=device), torch.randperm(batch, device=device)
        began = wait(device)
        with Memory(device) as memory:
            if negatives:
                loss, update = npid_step(bank, "grad", negatives, z, index, partner, weight)
                loss.backward()
                update()
            else:
                labels = torch.stack([index, index[partner]], 1)
                ce, kl, log_z = npid_distill.chunked_losses(z, bank.rows, labels, weight, 0.2, 0.5, False, 8192)
                (ce + 20 * kl).backward()
                bank.update_in_chunks(labels, z, log_z, 0.2, 8192, weight)
        times.append(wait(device) - began)
        on_top = max(on_top, memory.bytes)
    step = statistics.median(times[1:])
    return {"bank rows": rows, "dim": dim, "batch": batch, "negatives": negatives or "all", "ms": round(1e3 * step, 1), "images_per_s": round(batch / step, 1),
            "bank_MB": round(4e-6 * rows * dim), "on_top_MB": round(on_top / 1e6), "device": common.device_name(device), "torch": torch.__version__}


# ------------------------------------------------------------------------------------------- stages of large images


def bench_data(folder: str, arch: str, batch: int, size: int, device: torch.device) -> list[dict]:
    """Images per second of each stage by itself: which one to buy."""
    stored, rows = common.working_size(size), []
    images = common.find_tree("folder", pathlib.Path(folder), "train", stored)
    cpu, order = torch.device("cpu"), list(torch.arange(len(images)).split(batch))

    def row(stage, count, seconds):
        rows.append({"stage": stage, "images_per_s": round(count / seconds, 1), "images": len(images), "size": size, "device": common.device_name(device)})

    def read(source, workers=0):
        began = time.perf_counter()
        count = sum(len(x) for x, _ in source.batches(order, cpu, workers))
        return count, time.perf_counter() - began

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    row("decode, one core", *read(images))
    row("decode, two workers", *read(images, 2))
    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        mapped = common.cached(images, pathlib.Path(cache) / "photos", 0)
        row("decode and write the cache, one core", len(mapped), time.perf_counter() - began)
        row("read the cache, one core", *read(mapped))
        x = torch.stack([mapped[i % len(mapped)] for i in range(batch)])
    torch.set_num_threads(threads)

    def stage(name, function, repeat=3):
        function()
        began = wait(device)
        for _ in range(repeat):
            function()
        row(name, repeat * batch, wait(device) - began)

    stage("transfer to the device", lambda: x.to(device, copy=True))
    on_device, augment = x.to(device), common.BatchAugment(size).to(device)
    stage("augment, one view", lambda: augment(on_device))
    stage(f"{arch}, forward and backward, one view", network_alone(arch, "imagenet", augment(on_device)), 2)
    return rows


def draw(path: str, rows: list[dict]) -> None:
    """Images/s over the batch size, a line a method, or milliseconds over the bank's rows; where matplotlib is there."""
    if not (plt := pyplot("figure")):
        return
    x, y, line = ("bank rows", "ms", "negatives") if "bank rows" in rows[0] else ("batch", "images_per_s", "method")
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in dict.fromkeys(row[line] for row in rows):
        points = [(row[x], row[y]) for row in rows if row[line] == name]
        axis.plot(*zip(*points), marker="o", label=f"{line} {name}" if line == "negatives" else name)
    axis.set(xlabel=x, ylabel={"ms": "ms a step", "images_per_s": "images/s"}[y], xscale="log", yscale="log" if y == "ms" else "linear")
    if y == "images_per_s":
        axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in {"methods": ",".join(METHODS), "arch": "resnet10", "stem": "imagenet", "device": "auto", "amp": "auto", "npid": "--dim 512",
                          "batches": "", "banks": "", "negatives": "10000,0", "peer": "", "photos": "", "out": "", "figure": "", "dataset": "shapes",
                          "data": "data", "cache": ""}.items():
        parser.add_argument(f"--{flag}", default=default)
    for flag, default in {"batch": 256, "steps": 10, "dim": 128, "size": 0}.items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--tricks", action="store_true")
    args = parser.parse_args()
    device = common.pick_device(args.device)
    same = [word for name in ("dataset", "data", "cache", "arch", "stem", "size", "device", "amp") for word in (f"--{name}", str(getattr(args, name)))]
    flags = lambda batch: [*same, "--batch", str(batch)]  # noqa: E731
    names = args.methods.split(",")
    own = lambda name: shlex.split(args.npid) if name.startswith("npid") else []  # noqa: E731
    rows = []

    def take(row):
        rows.append(row)
        if "images_per_s" in row:
            print(f"{row.get('method') or row.get('stage') or row.get('bank rows')}: {row['images_per_s']} images/s", file=sys.stderr, flush=True)
        if args.out:
            common.append_line(pathlib.Path(args.out), json.dumps(row | {"command": common.launched_by()}))

    if args.photos:
        for row in bench_data(args.photos, args.arch, args.batch, args.size or 224, device):
            take(row)
    elif args.predict:
        for name in [name for name in names if "fusion" not in name]:  # the gradient of its images is not in the count
            take(predict(name, args.arch, args.stem, args.batch, args.size or 32, args.dim))
    elif args.banks:
        for n in map(int, args.banks.split(",")):
            for negatives in map(int, args.negatives.split(",")):
                take(bench_bank(n, args.dim, args.batch, negatives, args.steps, device))
    elif args.tricks:
        for name in names:
            for row in bench_tricks(name, [*flags(args.batch), *own(name)], args.steps):
                take(row)
    else:
        for batch in map(int, (args.batches or str(args.batch)).split(",")):
            for name in names:
                take(bench(name, [*flags(batch), *own(name)], args.steps, device))
    if args.peer:
        done = subprocess.run(args.peer, shell=True, capture_output=True, text=True, check=True)
        take({"method": f"peer: {args.peer}", "images_per_s": float(done.stdout.split()[-1])})
    if args.figure:
        draw(args.figure, rows)
    head = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in ("device", "torch")]
    print("\n".join(markdown(head, [[row.get(key, "") for key in head] for row in rows])))
    print(f"\n{rows[0].get('device', 'predicted, not measured')}, torch {torch.__version__}")


if __name__ == "__main__":
    with common.one_line_errors():
        main()
