"""What every rank of a pool imports, eleven seconds of a processor: done once, where the ranks are forked from."""

import deepspeed  # noqa: F401
import peft  # noqa: F401
import torch._dynamo
import torch.distributed.fsdp  # noqa: F401
import transformers.modeling_utils  # noqa: F401
