"""The compiler, DTensor and sympy stay away from a run that needs none of them, and come when they are asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.small_run import SMALL, write_rows

RUN = """
import sys
from distft.cli import main

class AtTheEnd:
    def find_spec(self, name, path=None, target=None):
        if name == "distft.model.final":  # training is over
            heavy = ["sympy", "torch._dynamo.eval_frame", "torch._inductor", "torch.distributed.tensor", "scipy"]
            print("imported:", *[name for name in heavy if name in sys.modules], flush=True)

sys.meta_path.insert(0, AtTheEnd())
sys.exit(main(["train", *sys.argv[1:]]))
"""

LOSSES = """
import sys
from distft.deferred import Losses, defer
defer()
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.loss import loss_deformable_detr, loss_utils
assert "scipy" not in sys.modules
assert isinstance(loss_deformable_detr, Losses)
matcher = loss_deformable_detr.DeformableDetrHungarianMatcher(class_cost=2.0)
assert matcher.class_cost == 2.0, "a class that extends one of another of these modules"
assert "scipy.optimize" in sys.modules
assert not [name for name, module in sys.modules.items() if isinstance(module, Losses)]
try:
    loss_utils.LOSS_MAPPING["ForObjectDetection"]()
except TypeError as error:
    assert "ForObjectDetectionLoss" in str(error), "what was imported before calls the loss itself"
else:
    raise AssertionError
"""

COMPILER = """
import sys
from distft.deferred import StandIn, defer
defer()
import torch
import torch._dynamo
assert isinstance(sys.modules["torch._dynamo"], StandIn)
calls = []

@torch.compiler.disable
def seen(x):
    calls.append(torch.compiler.is_compiling())
    return x + 1

@torch._dynamo.assume_constant_result
def constant():
    return 3

assert seen(torch.ones(1)) == 2
optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
optimizer.zero_grad()
optimizer.step()
assert isinstance(sys.modules["torch._dynamo"], StandIn), "an optimizer alone needs no compiler"

held = torch._dynamo
import torch._dynamo.eval_frame
assert not isinstance(sys.modules["torch._dynamo"], StandIn)
assert torch._dynamo is sys.modules["torch._dynamo"]
assert sys.modules["torch._dynamo.eval_frame"] is torch._dynamo.eval_frame
assert held.config is torch._dynamo.config
assert constant._dynamo_marked_constant

doubled = torch.compile(lambda x: seen(x) * constant(), backend="eager")
assert doubled(torch.ones(1)) == 6
assert calls == [False, False], "what was decorated before the compiler came is not compiled either"
"""

ADAPTERS = """
from distft.deferred import defer
defer()
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from distft.config.schema import Tuning
from distft.model.tuning import wrap
config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
from distft.model.load import parameters_on_meta
with parameters_on_meta():
    model = wrap(LlamaForCausalLM(config), Tuning(method="lora", lora_rank=2))
assert any(parameter.requires_grad for parameter in model.parameters())
import sys
assert "sympy" not in sys.modules
"""


def test_adapters_are_made_where_nothing_else_was_imported() -> None:
    done = subprocess.run([sys.executable, "-c", ADAPTERS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_imports_no_compiler(tmp_path: Path) -> None:
    words = [*SMALL, "data=jsonl", f"data.path={write_rows(tmp_path / 'rows.jsonl')}", f"run.dir={tmp_path / 'run'}"]
    words += [f"data.cache_dir={tmp_path / 'cache'}", "strategy=ddp", "max_steps=2"]
    done = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "imported:\n" in done.stdout, [line for line in done.stdout.splitlines() if "imported" in line]


def test_the_compiler_comes_when_it_is_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_losses_of_other_models_come_when_they_are_called() -> None:
    done = subprocess.run([sys.executable, "-c", LOSSES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
