"""One process of a torchrun job, or the only one: trains every run that the JSON file argv[1] lists, each in this process.

[["bassl", ["--batch", "16", ...]], ...]; used by test_processes.py, which compares jobs of one and of two processes. Beside the files of
the run, OUT gets start.pt, the parameters before the first step, and losses.json, the loss of every step in full precision.

Everything is computed in float64: in float32, steps through batch norms over few samples blow rounding noise up, and what is left would
not tell a wrong gradient from a different order of summation.
"""
import importlib
import json
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common  # noqa: E402
from killed import Small  # noqa: E402

torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
torch.set_default_dtype(torch.float64)


class Recorded(common.Run):
    def start(self, model, *args, **options):
        super().start(model, *args, **options)
        self.losses = []
        if common.rank() == 0:
            common.write_checkpoint(self.out / "start.pt", dict(self.model.named_parameters()))

    def log(self, **values):
        super().log(**values)
        self.losses.append(values["loss"].item())
        if common.rank() == 0:
            (self.out / "losses.json").write_text(json.dumps(self.losses))


if __name__ == "__main__":
    common.Run, common.resnet = Recorded, Small
    with common.one_line_errors():
        for name, argv in json.loads(pathlib.Path(sys.argv[1]).read_text()):
            script = importlib.import_module(name)
            script.train(common.parse(script.Config, "", argv))
