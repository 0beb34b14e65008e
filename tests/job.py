"""One process of a torchrun job, or the only one: trains every run that the JSON file argv[1] lists.

[["bassl", ["--batch", "16", ...]], ...]; test_processes.py compares jobs of one and of two. Beside the files
of a run, OUT gets record.pt: the parameters before the first step, and the loss of every step. In float64: in
float32, steps through norms over few samples blow rounding noise up, and what is left would not tell a wrong
gradient from another order of summation. Every process draws weights, queue and bank of its own.
"""
import importlib
import json
import pathlib
import sys

import torch
import torch.distributed as dist

from conftest import Small, common, parsed

torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
torch.set_default_dtype(torch.float64)
seed, seeded = torch.manual_seed, common.seeded
torch.manual_seed = lambda number: seed(number + common.rank())
common.seeded = lambda *key, **at: seeded(*key, *[common.rank()] * (key[0] == "bank"), **at)


class Total(torch.autograd.Function):
    """The sum over the processes; each has the gradient of the one loss through its own use of the sum."""

    @staticmethod
    def forward(ctx, x):
        dist.all_reduce(y := x.clone())
        return y

    backward = forward


class WholeNorm(torch.nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all processes."""

    def forward(self, x):
        axes, shape = [a for a in range(x.ndim) if a != 1], [1, -1, *[1] * (x.ndim - 2)]
        mean, var = self.running_mean, self.running_var
        if self.training:
            count = x.numel() // x.shape[1] * common.world()
            mean = Total.apply(x.sum(axes)) / count
            var = Total.apply((x - mean.view(shape)).square().sum(axes)) / count
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(var.detach() * count / (count - 1), self.momentum)
        x = (x - mean.view(shape)) / (var + self.eps).sqrt().view(shape)
        return x * self.weight.view(shape) + self.bias.view(shape)


class Recorded(common.Run):
    def start(self, model, *args, **options):
        for module in model.modules():
            if common.world() > 1 and isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.__class__ = WholeNorm
        super().start(model, *args, **options)
        start = {key: p.detach().clone() for key, p in model.named_parameters()}
        self.record = {"start": start, "losses": []}

    def log(self, **values):
        super().log(**values)
        self.record["losses"].append(values["loss"].item())
        if common.rank() == 0:
            torch.save(self.record, self.out / "record.pt")


if __name__ == "__main__":
    common.Run, common.resnet = Recorded, Small
    for name, argv in json.loads(pathlib.Path(sys.argv[1]).read_text()):
        script = importlib.import_module(name)
        script.train(parsed(script, *argv))
    if common.world() > 1:
        dist.destroy_process_group()
