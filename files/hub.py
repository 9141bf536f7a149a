"""Networks in the layout of diffusers, as the hub has them: other names, other arguments, other orders of axes."""
import functools, json, os, urllib.error
from pathlib import Path
import numpy as np
from tinygrad import helpers, nn
from files.atomic import atomic
from files.weights import build, fill, read_tensors, write_tensors
from unet import Conv, ResBlock, UNet

# *** tensors ***

PARTS = {"temb": "time_emb_proj", "shortcut": "conv_shortcut", "norm": "group_norm",
         "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
OLD_PARTS = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

def diffusers_names(model:UNet) -> list[tuple[str, str]]:
  """(our name, diffusers' name) of every tensor."""
  prefixes = [
    ("conv_in", "conv_in"), ("time1", "time_embedding.linear_1"), ("time2", "time_embedding.linear_2"),
    ("mid.0", "mid_block.resnets.0"), ("mid.1", "mid_block.attentions.0"), ("mid.2", "mid_block.resnets.1"),
    ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")]
  for side, stack, sampler in (("down", model.down, "downsamplers"), ("up", model.up, "upsamplers")):
    level = j = 0
    for n, layers in enumerate(stack):
      for i, layer in enumerate(layers):
        kind = "resnets" if isinstance(layer, ResBlock) else "attentions"
        prefixes.append((f"{side}.{n}.{i}", f"{side}_blocks.{level}.{sampler}.0.conv" if isinstance(layer, Conv) else
                                            f"{side}_blocks.{level}.{kind}.{j}"))
      if isinstance(layers[-1], Conv): level, j = level+1, 0
      else: j += 1
  table, names = dict(prefixes), []
  for ours in nn.state.get_state_dict(model):
    prefix = next((p for p in sorted(table, key=len, reverse=True) if ours.startswith(p+".")), None)
    if prefix is None: continue  # the labels' embedding has no counterpart
    *parts, leaf = ours[len(prefix)+1:].split(".")
    names.append((ours, ".".join([table[prefix], *(PARTS.get(p, p) for p in parts), leaf])))
  return names

def to_theirs(v:np.ndarray, name:str) -> np.ndarray:
  """(k,k,C,O) -> (O,C,k,k), and (C,O) -> (O,C), as which they have attention's 1x1 convolutions too."""
  if v.ndim == 4 and ".attentions." in name: v = v[0, 0]
  return v.transpose(3, 2, 0, 1) if v.ndim == 4 else v.T if v.ndim == 2 else v

def to_ours(v:np.ndarray, ndim:int) -> np.ndarray:
  """The inverse of `to_theirs`, with as many axes as our tensor has."""
  if v.ndim == 4: v = v.transpose(2, 3, 1, 0)
  elif v.ndim == 2: v = v.T
  return v[None, None] if v.ndim == 2 and ndim == 4 else v[0, 0] if v.ndim == 4 and ndim == 2 else v

# *** arguments ***

FIXED = {
  "act_fn": "silu", "norm_eps": 1e-6, "freq_shift": 1, "flip_sin_to_cos": False,
  "downsample_padding": 0, "downsample_type": "conv", "upsample_type": "conv",
  "time_embedding_type": "positional", "resnet_time_scale_shift": "default", "mid_block_scale_factor": 1,
  "center_input_sample": False, "add_attention": True, "class_embed_type": None, "num_class_embeds": None,
  "attention_head_dim": None, "attn_norm_num_groups": None, "time_embedding_dim": None}
SCHEDULES = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine"}
SIGMAS = {"fixed_large": "beta", "fixed_small": "beta_tilde"}
PREDICTS = {"epsilon": "eps", "sample": "x0"}

def to_diffusers(model:UNet, meta:dict) -> tuple[dict, dict]:
  """config.json and scheduler_config.json of a model."""
  c, d = model.config, meta.get("ddpm", {})
  if c["num_classes"]: raise ValueError("the diffusers layout cannot hold a model with class labels")
  attn = [c["image_size"] >> i in c["attn_resolutions"] for i in range(len(c["channel_mult"]))]
  back = lambda table, v: next(k for k, w in table.items() if w == v)
  try:
    scheduler = {
      "_class_name": "DDPMScheduler", "num_train_timesteps": d.get("T", 1000),
      "beta_start": d.get("beta_1", 1e-4), "beta_end": d.get("beta_T", 0.02),
      "beta_schedule": back(SCHEDULES, d.get("schedule", "linear")),
      "variance_type": back(SIGMAS, d.get("sigma", "beta")),
      "prediction_type": back(PREDICTS, d.get("predict", "eps")), "clip_sample": True}
  except StopIteration: raise ValueError("the diffusers layout has no name for this schedule or prediction") from None
  return {
    "_class_name": "UNet2DModel", **FIXED,
    "sample_size": c["image_size"], "in_channels": c["in_channels"], "out_channels": c["in_channels"],
    "block_out_channels": [c["channels"]*m for m in c["channel_mult"]],
    "layers_per_block": c["num_res_blocks"], "norm_num_groups": c["norm_groups"], "dropout": c["dropout"],
    "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attn],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attn)]}, scheduler

def from_diffusers(config:dict, path:Path) -> dict:
  """UNet's arguments from a config.json. ValueError naming what this network does not have."""
  for key, value in FIXED.items():
    if config.get(key, value) not in (value, *({"act_fn": ["swish"]}.get(key, []))):
      raise ValueError(f"{path}: {key} = {config[key]!r} is not supported, only {value!r}")
  for key in ("in_channels", "layers_per_block", "norm_num_groups", "sample_size"):
    if type(config.get(key)) is not int: raise ValueError(f"{path}: {key} = {config.get(key)!r} is no whole number")
  try:
    widths, size, down, up = (config["block_out_channels"], config["sample_size"],
                              list(config["down_block_types"]), list(config["up_block_types"]))
    for kind in down+up:
      if kind not in ("DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"):
        raise ValueError(f"{path}: the block type {kind!r} is not supported")
    attn = [d == "AttnDownBlock2D" for d in down]
    if config.get("mid_block_type", "UNetMidBlock2D") != "UNetMidBlock2D":
      raise ValueError(f"{path}: mid_block_type = {config['mid_block_type']!r} is not supported")
    if attn != [u == "AttnUpBlock2D" for u in reversed(up)] or len(widths) != len(down):
      raise ValueError(f"{path}: block_out_channels, down_block_types and up_block_types do not mirror each other")
    if config["out_channels"] != config["in_channels"]:
      raise ValueError(f"{path}: out_channels = {config['out_channels']} differs from in_channels")
    if any(w % widths[0] for w in widths):
      raise ValueError(f"{path}: block_out_channels = {widths} are not multiples of the first")
    return {
      "in_channels": config["in_channels"], "channels": int(widths[0]),
      "channel_mult": tuple(w//widths[0] for w in widths), "num_res_blocks": config["layers_per_block"],
      "attn_resolutions": tuple(size >> i for i, a in enumerate(attn) if a),
      "dropout": float(config.get("dropout") or 0), "image_size": size, "norm_groups": config["norm_num_groups"]}
  except (KeyError, TypeError, IndexError, ZeroDivisionError, OverflowError) as e:
    raise ValueError(f"{path} lacks or garbles an entry: {e}") from e

def from_scheduler(config:dict, path:Path) -> dict:
  """DDPM's arguments and whether x̂_0 is clipped, from a scheduler_config.json.

  ValueError naming what DDPM does not have."""
  for key, table in (("beta_schedule", SCHEDULES), ("variance_type", SIGMAS), ("prediction_type", PREDICTS)):
    if str(config.get(key, next(iter(table)))) not in table:
      raise ValueError(f"{path}: {key} = {config[key]!r} is not supported")
  return {
    "ddpm": {
      "T": config.get("num_train_timesteps", 1000), "beta_1": config.get("beta_start", 1e-4),
      "beta_T": config.get("beta_end", 0.02), "schedule": SCHEDULES[config.get("beta_schedule", "linear")],
      "sigma": SIGMAS[config.get("variance_type", "fixed_large")],
      "predict": PREDICTS[config.get("prediction_type", "epsilon")]},
    "clip": bool(config.get("clip_sample", True))}

# *** folders ***

def save(folder:str|os.PathLike, model:UNet, meta:dict|None=None):
  """Writes a folder that diffusers reads. OSError if it cannot, ValueError for what the layout cannot hold."""
  folder, tensors = Path(folder), {k: v.numpy() for k, v in nn.state.get_state_dict(model).items()}
  config, scheduler = to_diffusers(model, meta or {})
  renamed = {theirs: to_theirs(tensors.pop(ours), theirs) for ours, theirs in diffusers_names(model)}
  if tensors: raise ValueError(f"the diffusers layout has no place for the tensor {min(tensors)!r}")
  write_tensors(folder/"diffusion_pytorch_model.safetensors", renamed, {"format": "pt"})
  for name, content in (("config.json", config), ("scheduler_config.json", scheduler)):
    with atomic(folder/name) as f: f.write(json.dumps(content, indent=2).encode() + b"\n")

def read_json(path:Path) -> dict:
  """A JSON object. OSError, ValueError if it is none."""
  try: value = json.loads(path.read_text(encoding="utf-8"))
  except OSError as e: raise OSError(f"cannot read {path}: {e.strerror or e}") from e
  except (ValueError, RecursionError): raise ValueError(f"{path} is not JSON") from None
  if not isinstance(value, dict): raise ValueError(f"{path} is not a JSON object")
  return value

def load(folder:str|os.PathLike) -> tuple[UNet, dict]:
  """(model, meta) from a folder in diffusers' layout, of a network alone or of a whole pipeline.

  OSError or ValueError, in one sentence, for what cannot be read, is damaged, or is no network of this program."""
  folder = Path(folder)
  if (folder/"unet"/"config.json").exists(): folder = folder/"unet"
  if not (folder/"config.json").exists():
    raise ValueError(f"{folder} holds no config.json: it is no model in the diffusers layout")
  single, index = (folder/"diffusion_pytorch_model.safetensors",
                   folder/"diffusion_pytorch_model.safetensors.index.json")
  config = from_diffusers(read_json(folder/"config.json"), folder/"config.json")
  if single.exists(): files = [single]
  elif index.exists():
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(v, str) and os.path.basename(v) == v for v in parts.values()):
      raise ValueError(f"{index} has no valid weight_map")
    files = [folder/f for f in sorted(set(parts.values()))]
  elif any(folder.glob("*.bin")):
    raise ValueError(f"{folder} holds a pickle (.bin), which can run any program when read: "
                     "only safetensors files are loaded")
  else: raise ValueError(f"{folder} holds no diffusion_pytorch_model.safetensors")
  found = {k: v for f in files for k, v in read_tensors(f)[0].items()}
  model = build(config, folder)
  state, tensors = nn.state.get_state_dict(model), {}
  for ours, theirs in diffusers_names(model):
    old = functools.reduce(lambda s, kv: s.replace(f".{kv[0]}.", f".{kv[1]}."), OLD_PARTS.items(), theirs)
    name = theirs if theirs in found else old
    if name not in found: raise ValueError(f"{folder} lacks the tensor {theirs!r}")
    tensors[ours] = to_ours(found.pop(name), state[ours].ndim)
  if found:
    raise ValueError(f"{folder} has an unknown tensor {min(found)!r}"
                     f"{f' (and {len(found)-1} more)' if len(found) > 1 else ''}")
  meta:dict = {"unet": model.config, "ddpm": {}, "source": str(folder)}
  for s in (folder/"scheduler_config.json", folder/"scheduler"/"scheduler_config.json",
            folder.parent/"scheduler"/"scheduler_config.json"):
    if not s.exists(): continue
    meta |= from_scheduler(read_json(s), s)
    break
  return fill(model, tensors, folder), meta

def download(name:str) -> Path:
  """The folder of a model on the hub, fetched into tinygrad's cache. OSError, in one sentence, when that fails."""
  folder = Path(helpers.cache_dir)/"downloads"/name
  for file, needed in (("config.json", True), ("scheduler_config.json", False),
                       ("diffusion_pytorch_model.safetensors", True)):
    try: helpers.fetch(f"https://huggingface.co/{name}/resolve/main/{file}", folder/file)
    except urllib.error.HTTPError as e:
      if needed:
        raise OSError(f"the hub has no {file} for {name!r} ({e.code} {e.reason}), "
                      "and there is no file or folder of that name here") from e
    except OSError as e:
      raise OSError(f"{name!r} is neither a file nor a folder here, and it could not be downloaded: "
                    f"{getattr(e, 'reason', e)}") from e
  return folder
