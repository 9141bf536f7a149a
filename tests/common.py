"""What several test files share."""
import os
from pathlib import Path
import numpy as np
import pytest
from tinygrad import Device, helpers, nn
import unet
from engine.capture import placed
from engine.device import open_device

open_device(silent=True)  # the one that programs take: without $DEV the processor itself rather than by way of OpenCL
# outside of captured steps, which have this of themselves: loops as they are written compile in less time
if Device.DEFAULT == "CPU": helpers.NOOPT.value = 1
ROOT = Path(__file__).parent.parent
GOLDEN = Path(os.environ.get("GOLDEN_DIR", ROOT.parent/"shared"/"golden"))
DATA = Path(os.environ.get("DATA_DIR", ROOT.parent/"shared"/"data"))
TINY = dict(in_channels=1, channels=8, channel_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), dropout=0.0,
            image_size=8, norm_groups=4)
close = np.testing.assert_allclose

def rng(seed=0): return np.random.default_rng(seed)
def f32(a): return placed(np.asarray(a, np.float32), Device.DEFAULT)
def arr(*shape, seed=0, scale=1.0):
  return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(np.float32)

def random_model(**kw):
  """A network whose last layers are not near 0, so that every weight has an influence."""
  model = unet.UNet(**{**TINY, **kw})
  parameters = nn.state.get_parameters(model)
  for i, p in enumerate(parameters): p.replace(f32(p.numpy() + arr(*p.shape, seed=i, scale=0.1)))
  return model

def refused(call, *words):
  """The call is refused in one sentence that holds all the words."""
  with pytest.raises((ValueError, OSError)) as caught: call()
  assert type(caught.value) in (ValueError, OSError, FileNotFoundError)
  message = str(caught.value)
  assert "\n" not in message and len(message) > 15 and not [w for w in words if str(w) not in message], message
