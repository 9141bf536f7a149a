"""Networks in the layout of diffusers, as the hub has them: other names, other arguments, other orders of axes."""
import functools, json, math, os, reprlib, sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
import numpy as np
from tinygrad import nn
from ddpm import make_beta
from files.atomic import atomic
from files.weights import fill, open_tensors, plainly, refuse_pickle, write_tensors
from unet import Conv, ResBlock, UNet

# *** tensors ***

PARTS = {"temb": "time_emb_proj", "shortcut": "conv_shortcut", "norm": "group_norm",
         "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
OLD_PARTS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OUTER = {"conv_in": "conv_in", "time1": "time_embedding.linear_1", "time2": "time_embedding.linear_2",
         "mid.0": "mid_block.resnets.0", "mid.1": "mid_block.attentions.0", "mid.2": "mid_block.resnets.1",
         "norm_out": "conv_norm_out", "conv_out": "conv_out"}
FIRST, CLASSES = "time_embedding.linear_1.weight", "class_embedding.weight"

def diffusers_names(model:UNet) -> dict[str, str]:
  """Our name of every tensor -> diffusers' name."""
  table = dict(OUTER)
  for side, stack in (("down", model.down), ("up", model.up)):
    level = j = 0
    for n, layers in enumerate(stack):
      for i, layer in enumerate(layers):
        place = f"resnets.{j}" if isinstance(layer, ResBlock) else f"attentions.{j}"
        if isinstance(layer, Conv): place = f"{side}samplers.0.conv"
        table[f"{side}.{n}.{i}"] = f"{side}_blocks.{level}.{place}"
      level, j = (level+1, 0) if isinstance(layers[-1], Conv) else (level, j+1)
  def theirs(ours:str) -> str:
    prefix = max((p for p in table if ours.startswith(p+".")), key=len)
    *parts, leaf = ours.removeprefix(prefix+".").split(".")
    return ".".join([table[prefix], *(PARTS.get(p, p) for p in parts), leaf])
  return {k: CLASSES if k == "label" else theirs(k) for k in nn.state.get_state_dict(model)}

def to_theirs(v:np.ndarray, name:str, null:bool) -> np.ndarray:
  """(k,k,C,O) -> (O,C,k,k), and (C,O) -> (O,C), as which they have attention's 1x1 convolutions too.

  Embeddings of classes stay as they are; without `null`, that of "no class" is not kept."""
  if name == CLASSES: return v if null else v[:-1]
  if v.ndim == 4 and ".attentions." in name: v = v[0, 0]
  return v.transpose(3, 2, 0, 1) if v.ndim == 4 else v.T

def to_ours(read:Callable[[], np.ndarray], name:str, ndim:int, null:bool, flip:bool) -> np.ndarray:
  """The inverse of `to_theirs` for a tensor yet to be read, with as many axes as ours has. flip: they embed the time as
  cosines, then sines, so that rows of the first layer change places."""
  v = read()
  if name == CLASSES: return v if null or not v.ndim else np.concatenate([v, np.zeros_like(v[:1])])
  v = v.transpose(2, 3, 1, 0) if v.ndim == 4 else v.T
  if name == FIRST and flip: v = np.roll(v, len(v)//2, axis=0)
  if v.ndim == 2 and ndim == 4: return v[None, None]
  return v[0, 0] if v.ndim == 4 and ndim == 2 else v

# *** arguments: a key that a file lacks has diffusers' default ***

NETWORK = {
  "sample_size": None, "in_channels": 3, "out_channels": 3, "block_out_channels": [224, 448, 672, 896],
  "down_block_types": ["DownBlock2D"] + 3*["AttnDownBlock2D"], "up_block_types": 3*["AttnUpBlock2D"] + ["UpBlock2D"],
  "layers_per_block": 2, "norm_num_groups": 32, "norm_eps": 1e-5, "dropout": 0.0, "attention_head_dim": 8,
  "downsample_padding": 1, "freq_shift": 0, "flip_sin_to_cos": True, "num_class_embeds": None}
FIXED = {  # what this network does not have otherwise
  "_class_name": "UNet2DModel", "act_fn": "silu", "center_input_sample": False, "time_embedding_type": "positional",
  "time_embedding_dim": None, "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1, "add_attention": True,
  "downsample_type": "conv", "upsample_type": "conv", "attn_norm_num_groups": None,
  "resnet_time_scale_shift": "default", "class_embed_type": None}
SCHEDULER = {
  "_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02,
  "beta_schedule": "linear", "variance_type": "fixed_small", "prediction_type": "epsilon", "clip_sample": True,
  "clip_sample_range": 1.0, "thresholding": False, "rescale_betas_zero_snr": False, "trained_betas": None}
SAME = {"in_channels": "in_channels", "layers_per_block": "num_res_blocks", "norm_num_groups": "norm_groups",
        "norm_eps": "norm_eps", "dropout": "dropout", "downsample_padding": "down_pad", "freq_shift": "freq_shift"}
SCHEDULES = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine"}
SIGMAS = {"fixed_large": "beta", "fixed_small": "beta_tilde", "fixed_small_log": "beta_tilde"}
PREDICTS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
OURS = ("classes", "limits", "untrained", "span", "how")  # of a checkpoint's description, unknown to diffusers

def to_diffusers(model:UNet, meta:dict) -> tuple[dict, dict]:
  """config.json and scheduler_config.json of a model. ValueError for what diffusers has no name for."""
  if type(model) is not UNet: raise ValueError("only a network of this program has a place in diffusers' layout")
  c, null = model.config, meta.get("null_class", True)
  d:dict = {"T": 1000, "beta_1": 1e-4, "beta_T": 0.02, "schedule": "linear", "sigma": "beta", "predict": "eps"}
  d |= meta.get("ddpm", {})
  def named(table:dict[str, str], key:str) -> str:
    for theirs, ours in table.items():
      if ours == d[key]: return theirs
    raise ValueError(f"diffusers has no name for {key} = {d[key]!r}")
  scheduler = SCHEDULER | {
    "num_train_timesteps": int(d["T"]), "beta_start": d["beta_1"], "beta_end": d["beta_T"],
    "variance_type": named(SIGMAS, "sigma"), "prediction_type": named(PREDICTS, "predict"),
    "clip_sample": bool(meta.get("clip", True))}
  if str(d["schedule"]) in SCHEDULES.values(): scheduler["beta_schedule"] = named(SCHEDULES, "schedule")
  else: scheduler["trained_betas"] = make_beta(d["T"], d["beta_1"], d["beta_T"], d["schedule"])[1:].tolist()
  attn = [len(layers) > 1 for layers in model.down[::c["num_res_blocks"]+1]]  # of each level
  config = FIXED | {
    "sample_size": c["image_size"], "out_channels": c["out_channels"] or c["in_channels"],
    "block_out_channels": [c["channels"]*m for m in c["channel_mult"]],
    "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attn],
    "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attn)],
    "attention_head_dim": c["head_channels"] or None, "flip_sin_to_cos": False, "num_class_embeds": None}
  config |= {theirs: c[ours] for theirs, ours in SAME.items()}
  if c["num_classes"]: config |= {"num_class_embeds": c["num_classes"] + null, "_null_class": null}  # the last is none
  return config | {f"_{k}": meta[k] for k in OURS if meta.get(k)}, scheduler

def supported(path:Path, config:dict, key:str, ok:object, only:str):
  """ValueError naming the key and its value unless `ok`."""
  if not ok: raise ValueError(f"{path}: {key} = {reprlib.repr(config[key])} is not supported, only {only}")

def whole(v:object) -> bool: return type(v) is int and 0 < v < 2**31

def real(v:object) -> bool: return isinstance(v, int|float) and type(v) is not bool and abs(v) < 1e9

def from_diffusers(config:dict, path:Path) -> dict:
  """UNet's arguments from a config.json. ValueError naming what this network does not have."""
  c:dict[str, Any] = NETWORK | FIXED | config
  check = functools.partial(supported, path, c)
  for key in ("in_channels", "out_channels", "layers_per_block", "norm_num_groups"):
    check(key, whole(c[key]), "a whole number")
  for key in ("attention_head_dim", "num_class_embeds"): check(key, c[key] is None or whole(c[key]), "a whole number")
  for key in ("norm_eps", "freq_shift", "dropout"): check(key, real(c[key]), "a number")
  check("flip_sin_to_cos", type(c["flip_sin_to_cos"]) is bool, "true and false")
  check("downsample_padding", c["downsample_padding"] in (0, 1), "0 and 1")
  size, widths, down = c["sample_size"], c["block_out_channels"], c["down_block_types"]
  sizes = size if isinstance(size, list) else [size, size]
  check("sample_size", len(sizes) == 2 and all(map(whole, sizes)), "a whole number or two")
  check("block_out_channels", isinstance(widths, list) and widths and all(map(whole, widths)) and
        not any(w % widths[0] for w in widths), "multiples of the first")
  also = {"act_fn": "swish", "attn_norm_num_groups": c["norm_num_groups"], "time_embedding_dim": 4*widths[0]}
  for key, value in FIXED.items(): check(key, c[key] in (value, also.get(key, value)), repr(value))
  check("down_block_types", isinstance(down, list) and len(down) == len(widths) and
        all(d in ("DownBlock2D", "AttnDownBlock2D") for d in down), "one of DownBlock2D, AttnDownBlock2D a level")
  check("up_block_types", c["up_block_types"] == [d.replace("Down", "Up") for d in reversed(down)],
        "down_block_types mirrored")
  attn, heads = [d == "AttnDownBlock2D" for d in down], c["attention_head_dim"]
  check("attention_head_dim", not heads or not any(w % heads for w, a in zip(widths, [*attn[:-1], True]) if a),
        f"what divides block_out_channels = {widths}")
  return {ours: c[theirs] for theirs, ours in SAME.items()} | {
    "out_channels": None if c["out_channels"] == c["in_channels"] else c["out_channels"],
    "channels": widths[0], "channel_mult": tuple(w//widths[0] for w in widths), "head_channels": heads or 0,
    "attn_resolutions": tuple(max(sizes) >> i for i, a in enumerate(attn) if a),
    "image_size": size if type(size) is int else tuple(size),
    "num_classes": max(0, (c["num_class_embeds"] or 0) - (c.get("_null_class") is True))}

def from_scheduler(config:dict, path:Path) -> dict:
  """DDPM's arguments and whether x̂_0 is clipped, from a scheduler_config.json. ValueError naming what there is not."""
  c = SCHEDULER | config
  if config.get("predict_epsilon") is False: c = c | {"prediction_type": "sample"} | config  # its name before
  check = functools.partial(supported, path, c)
  T, betas = c["num_train_timesteps"], c["trained_betas"]
  check("_class_name", c["_class_name"] in ("DDPMScheduler", "DDIMScheduler"), "DDPMScheduler and DDIMScheduler")
  check("num_train_timesteps", whole(T), "a whole number")
  for key in ("beta_start", "beta_end", "clip_sample_range"): check(key, real(c[key]), "a number")
  for key, table in (("beta_schedule", SCHEDULES), ("variance_type", SIGMAS), ("prediction_type", PREDICTS)):
    check(key, str(c[key]) in table, ", ".join(table))
  check("trained_betas", betas is None or isinstance(betas, list) and len(betas) == T and
        all(real(b) and 0 < b < 1 for b in betas), f"num_train_timesteps = {T} numbers between 0 and 1")
  for key in ("thresholding", "rescale_betas_zero_snr"): check(key, c[key] is False, "false")
  check("clip_sample", type(c["clip_sample"]) is bool, "true and false")
  check("clip_sample_range", c["clip_sample_range"] == 1 or not c["clip_sample"], "1")
  return {"clip": c["clip_sample"], "ddpm": {
    "T": T, "beta_1": c["beta_start"], "beta_T": c["beta_end"], "schedule": betas or SCHEDULES[c["beta_schedule"]],
    "sigma": SIGMAS[c["variance_type"]], "predict": PREDICTS[c["prediction_type"]]}}

# *** folders ***

# its tensors, in one file or in those of an index; of 16 bits only where there are no others
WEIGHTS = [f"diffusion_pytorch_model{v}" for v in (
  ".safetensors", ".safetensors.index.json", ".fp16.safetensors", ".safetensors.index.fp16.json")]
NETWORKS = ("unet_ema/", "unet/", "")  # where a network may be in a folder; the averaged weights come first

def save(folder:str|os.PathLike, model:UNet, meta:dict|None=None):
  """Writes a pipeline that diffusers opens: unet/, scheduler/, model_index.json.

  OSError if it cannot, ValueError for what the layout cannot hold, and for a folder that has averaged weights already,
  which come before these."""
  folder, meta = Path(folder), json.loads(json.dumps(meta or {}, default=plainly))
  if (folder/NETWORKS[0]).exists(): raise ValueError(f"{folder} holds {NETWORKS[0]}, from which a model would be read")
  config, scheduler = to_diffusers(model, meta)
  state, null = nn.state.get_state_dict(model), meta.get("null_class", True)
  tensors = {k: to_theirs(state[ours].float().numpy(), k, null) for ours, k in diffusers_names(model).items()}
  index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"],
           "unet": ["diffusers", "UNet2DModel"]}
  texts = {name: json.dumps(content, indent=2, default=plainly).encode() + b"\n" for name, content in (
    ("unet/config.json", config), ("scheduler/scheduler_config.json", scheduler), ("model_index.json", index))}
  write_tensors(folder/"unet"/WEIGHTS[0], tensors, {})
  for name, text in texts.items():
    with atomic(folder/name) as f: f.write(text)

def load(folder:str|os.PathLike, raw:bool=False) -> tuple[UNet, dict]:
  """(model, meta) from a folder in diffusers' layout: of a network, of a pipeline, or a checkpoint of its training, of
  which the averaged weights are taken, or with `raw` those being trained.

  OSError or ValueError, in one sentence, for what cannot be read, is damaged, or is no network of this program."""
  folder = Path(folder)
  place = find_network(folder, raw)
  if (folder/"model_index.json").exists():
    index = read_json(folder/"model_index.json")
    for key in index:
      known = key in ("unet", "scheduler") or key.startswith("_")
      supported(folder/"model_index.json", index, key, known, "unet and scheduler")
  config = read_json(place/"config.json")
  args = from_diffusers(config, place/"config.json")
  null, flip = config.get("_null_class") is True, config.get("flip_sin_to_cos", True)
  meta:dict = {"source": str(folder)} | find_scheduler(folder, place)
  try: model = UNet(**args)
  except ValueError as e: raise ValueError(f"{place/'config.json'}: {e}") from e
  state, names, readers = nn.state.get_state_dict(model), diffusers_names(model), {}
  state = {names[ours]: v for ours, v in state.items()}
  for name, read in (pair for file in find_weights(place) for pair in open_tensors(file)[0].items()):
    for old, new in OLD_PARTS.items(): name = name.replace(f".{old}.", f".{new}.")
    if name in readers: raise ValueError(f"{name} is in two of the files of {place}")
    readers[name] = functools.partial(to_ours, read, name, state[name].ndim if name in state else 0, null, flip)
  fill(state, readers, place)
  meta["unet"] = model.config
  if args["num_classes"] and not null: meta["null_class"] = False
  meta |= {k: config[f"_{k}"] for k in OURS if config.get(f"_{k}") is not None}
  check_images(meta, place/"config.json")
  return model, meta

def check_images(meta:dict, path:str|os.PathLike):
  """ValueError unless what a checkpoint says of its images is what train.py writes."""
  def finite(v) -> bool: return isinstance(v, int | float) and -math.inf < v < math.inf
  def numbers(v) -> bool: return isinstance(v, list) and len(v) == 2 and all(map(finite, v))
  def names(v) -> bool: return isinstance(v, list) and all(isinstance(n, str) for n in v)
  def how(v) -> bool:  # what data.read takes
    if not isinstance(v, dict) or not v.keys() <= {"size", "fit", "mode", "multiple"}: return False
    size, fit, mode = v.get("size"), ("crop", "pad", "stretch"), (None, "gray", "rgb")
    return whole(v.get("multiple", 1)) and v.get("fit", "crop") in fit and v.get("mode") in mode and (
      size is None or whole(size) or isinstance(size, list) and len(size) == 2 and all(map(whole, size)))
  def some(v) -> bool: return isinstance(v, list) and all(isinstance(n, int) for n in v)
  known:dict[str, Callable] = {
    "limits": lambda v: v is None or numbers(v), "span": lambda v: v is None or numbers(v) and v[0] < v[1],
    "classes": names, "untrained": some, "how": how, "dataset": lambda v: v is None or isinstance(v, str)}
  for k, right in known.items():
    if k in meta and not right(meta[k]):
      raise ValueError(f"{path}: what it says of its images is damaged: {k} = {str(meta[k])[:80]}")

def read_json(path:Path) -> dict:
  """A JSON object. OSError, ValueError if it is none."""
  try: value = json.loads(path.read_text(encoding="utf-8"))
  except OSError as e: raise OSError(f"cannot read {path}: {e.strerror or e}") from e
  except (ValueError, RecursionError): raise ValueError(f"{path} is not JSON") from None
  if not isinstance(value, dict): raise ValueError(f"{path} is not a JSON object")
  return value

def find_network(folder:Path, raw:bool=False) -> Path:
  """The folder of the network itself. ValueError if there is none."""
  for part in NETWORKS[raw:]:
    if (folder/part/"config.json").is_file(): return folder/part
  raise ValueError(f"{folder} holds no config.json: it is no model in the diffusers layout")

def find_weights(place:Path) -> list[Path]:
  """The files of its tensors: one, or those of an index. ValueError if there are none."""
  for name in WEIGHTS:
    if (place/name).is_file(): return shards(place/name) if name.endswith(".json") else [place/name]
  for path in sorted(place.glob("*.bin")): refuse_pickle(path)
  raise ValueError(f"{place} holds no {WEIGHTS[0]}")

def shards(index:Path) -> list[Path]:
  """The files into which an index divides the tensors."""
  parts = read_json(index).get("weight_map")
  if not isinstance(parts, dict) or not all(isinstance(v, str) and os.path.basename(v) == v for v in parts.values()):
    raise ValueError(f"{index} has no valid weight_map")
  return [index.with_name(v) for v in sorted(set(parts.values()))]

def find_scheduler(folder:Path, place:Path) -> dict:
  """What the nearest scheduler_config.json says; that of a training's checkpoint is two folders above its networks."""
  for near in (place, folder, *(above/"scheduler" for above in (place, place.parent, place.parent.parent))):
    path = near/"scheduler_config.json"
    if path.is_file(): return from_scheduler(read_json(path), path)
  print(f"{place} has no scheduler_config.json: diffusers' defaults are taken, 1000 linear steps and a network that "
        "predicts the noise", file=sys.stderr)
  return from_scheduler({}, place)
