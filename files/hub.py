"""Networks in the layout of diffusers, as the hub has them: other names, other arguments, other orders of axes."""
import fcntl, functools, http.client, json, os, re, reprlib, urllib.error, urllib.parse, urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO
import numpy as np
from tinygrad import helpers, nn
from files.atomic import atomic
from files.bar import progress
from files.weights import converting, fill, open_tensors, refuse_pickle, write_tensors
from unet import Conv, ResBlock, UNet

# *** tensors ***

PARTS = {"temb": "time_emb_proj", "shortcut": "conv_shortcut", "norm": "group_norm",
         "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
OLD_PARTS = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

def diffusers_names(model:UNet) -> list[tuple[str, str]]:
  """(our name, diffusers' name) of every tensor."""
  table = {
    "conv_in": "conv_in", "time1": "time_embedding.linear_1", "time2": "time_embedding.linear_2",
    "mid.0": "mid_block.resnets.0", "mid.1": "mid_block.attentions.0", "mid.2": "mid_block.resnets.1",
    "norm_out": "conv_norm_out", "conv_out": "conv_out"}
  for side, stack, sampler in (("down", model.down, "downsamplers"), ("up", model.up, "upsamplers")):
    level = j = 0
    for n, layers in enumerate(stack):
      for i, layer in enumerate(layers):
        place = f"resnets.{j}" if isinstance(layer, ResBlock) else f"attentions.{j}"
        if isinstance(layer, Conv): place = f"{sampler}.0.conv"
        table[f"{side}.{n}.{i}"] = f"{side}_blocks.{level}.{place}"
      if isinstance(layers[-1], Conv): level, j = level+1, 0
      else: j += 1
  names = []
  for ours in nn.state.get_state_dict(model):
    if ours == "label":
      names.append((ours, "class_embedding.weight"))
      continue
    prefix = max((p for p in table if ours.startswith(p+".")), key=len)
    *parts, leaf = ours[len(prefix)+1:].split(".")
    names.append((ours, ".".join([table[prefix], *(PARTS.get(p, p) for p in parts), leaf])))
  return names

def to_theirs(v:np.ndarray, name:str, null:bool) -> np.ndarray:
  """(k,k,C,O) -> (O,C,k,k), and (C,O) -> (O,C), as which they have attention's 1x1 convolutions too.

  Embeddings of classes stay as they are; without `null`, that of "no class" is not kept."""
  if name == "class_embedding.weight": return v if null else v[:-1]
  if v.ndim == 4 and ".attentions." in name: v = v[0, 0]
  if v.ndim == 4: return v.transpose(3, 2, 0, 1)
  return v.T if v.ndim == 2 else v

def to_ours(read:Callable[[], np.ndarray], name:str, ndim:int, null:bool, flip:bool) -> np.ndarray:
  """The inverse of `to_theirs` for a tensor yet to be read, with as many axes as ours has. flip: they embed the time as
  cosines, then sines, so that rows of the first layer change places."""
  v = read()
  if name == "class_embedding.weight": return v if null else np.concatenate([v, np.zeros_like(v[:1])])
  if v.ndim == 4: v = v.transpose(2, 3, 1, 0)
  elif v.ndim == 2: v = v.T
  if name == "time_embedding.linear_1.weight" and flip: v = np.roll(v, len(v)//2, axis=0)
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
SCHEDULES = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine"}
SIGMAS = {"fixed_large": "beta", "fixed_small": "beta_tilde", "fixed_small_log": "beta_tilde"}
PREDICTS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}

def to_diffusers(model:UNet, meta:dict) -> tuple[dict, dict]:
  """config.json and scheduler_config.json of a model. ValueError for what diffusers has no name for."""
  if type(model) is not UNet: raise ValueError("only a network of this program has a place in diffusers' layout")
  c:dict = model.config
  d = {"T": 1000, "beta_1": 1e-4, "beta_T": 0.02, "schedule": "linear", "sigma": "beta", "predict": "eps"}
  d |= meta.get("ddpm", {})
  if d["schedule"] == "const": d |= {"schedule": "linear", "beta_1": d["beta_T"]}
  def back(table:dict[str, str], key:str) -> str:
    for theirs, ours in table.items():
      if ours == d[key]: return theirs
    raise ValueError(f"diffusers has no name for {key} = {d[key]!r}")
  scheduler = SCHEDULER | {
    "num_train_timesteps": d["T"], "beta_start": d["beta_1"], "beta_end": d["beta_T"],
    "beta_schedule": back(SCHEDULES, "schedule"), "variance_type": back(SIGMAS, "sigma"),
    "prediction_type": back(PREDICTS, "predict"), "clip_sample": bool(meta.get("clip", True))}
  firsts = model.down[::c["num_res_blocks"]+1]  # of each level
  attn, null = [len(layers) > 1 for layers in firsts], meta.get("null_class", True)
  config = FIXED | {
    "sample_size": c["image_size"], "in_channels": c["in_channels"],
    "out_channels": c["out_channels"] or c["in_channels"],
    "block_out_channels": [c["channels"]*m for m in c["channel_mult"]],
    "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attn],
    "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attn)],
    "layers_per_block": c["num_res_blocks"], "norm_num_groups": c["norm_groups"], "norm_eps": c["norm_eps"],
    "dropout": c["dropout"], "attention_head_dim": c["head_channels"] or None, "downsample_padding": c["down_pad"],
    "freq_shift": c["freq_shift"], "flip_sin_to_cos": False, "num_class_embeds": None}
  if c["num_classes"]: config |= {"num_class_embeds": c["num_classes"] + null, "_null_class": null}  # the last is none
  return config, scheduler

def supported(path:Path, config:dict, key:str, ok:object, only:str):
  """ValueError naming the key and its value unless `ok`."""
  if not ok: raise ValueError(f"{path}: {key} = {reprlib.repr(config[key])} is not supported, only {only}")

def whole(v:object) -> bool: return type(v) is int and 0 < v < 2**31

def real(v:object) -> bool: return isinstance(v, int|float) and type(v) is not bool and abs(v) < 1e9

def from_diffusers(config:dict, path:Path) -> dict:
  """UNet's arguments from a config.json. ValueError naming what this network does not have."""
  c = NETWORK | FIXED | config
  check = functools.partial(supported, path, c)
  for key in ("in_channels", "out_channels", "layers_per_block", "norm_num_groups"):
    check(key, whole(c[key]), "a whole number")
  for key in ("attention_head_dim", "num_class_embeds"): check(key, c[key] is None or whole(c[key]), "a whole number")
  for key in ("norm_eps", "freq_shift", "dropout"): check(key, real(c[key]), "a number")
  check("flip_sin_to_cos", type(c["flip_sin_to_cos"]) is bool, "true and false")
  check("downsample_padding", c["downsample_padding"] in (0, 1), "0 and 1")
  size, widths, down, up = (c[k] for k in ("sample_size", "block_out_channels", "down_block_types", "up_block_types"))
  sizes = size if isinstance(size, list) else [size, size]
  check("sample_size", len(sizes) == 2 and all(map(whole, sizes)), "a whole number or two")
  check("block_out_channels", isinstance(widths, list) and widths and all(map(whole, widths)) and
        not any(w % widths[0] for w in widths), "multiples of the first")
  also = {"act_fn": "swish", "attn_norm_num_groups": c["norm_num_groups"], "time_embedding_dim": 4*widths[0]}
  for key, value in FIXED.items(): check(key, c[key] in (value, also.get(key, value)), repr(value))
  check("down_block_types", isinstance(down, list) and len(down) == len(widths) and
        all(d in ("DownBlock2D", "AttnDownBlock2D") for d in down), "one of DownBlock2D, AttnDownBlock2D a level")
  check("up_block_types", up == [d.replace("Down", "Up") for d in reversed(down)], "down_block_types mirrored")
  attn = [d == "AttnDownBlock2D" for d in down]
  heads, outputs = c["attention_head_dim"], c["out_channels"]
  if outputs == c["in_channels"]: outputs = None
  check("attention_head_dim", not heads or not any(w % heads for w, a in zip(widths, [*attn[:-1], True]) if a),
        f"what divides block_out_channels = {widths}")
  classes = c["num_class_embeds"] or 0
  if c.get("_null_class") is True: classes = max(classes-1, 0)
  return {
    "in_channels": c["in_channels"], "out_channels": outputs, "channels": widths[0],
    "channel_mult": tuple(w//widths[0] for w in widths), "num_res_blocks": c["layers_per_block"],
    "attn_resolutions": tuple(max(sizes) >> i for i, a in enumerate(attn) if a), "dropout": float(c["dropout"]),
    "image_size": size if type(size) is int else tuple(size), "norm_groups": c["norm_num_groups"],
    "num_classes": classes, "head_channels": heads or 0,
    "norm_eps": float(c["norm_eps"]), "down_pad": c["downsample_padding"], "freq_shift": c["freq_shift"]}

def from_scheduler(config:dict, path:Path) -> dict:
  """DDPM's arguments and whether x̂_0 is clipped, from a scheduler_config.json. ValueError naming what DDPM has not."""
  c = SCHEDULER | config
  check = functools.partial(supported, path, c)
  check("_class_name", c["_class_name"] in ("DDPMScheduler", "DDIMScheduler"), "DDPMScheduler and DDIMScheduler")
  check("num_train_timesteps", whole(c["num_train_timesteps"]), "a whole number")
  for key in ("beta_start", "beta_end", "clip_sample_range"): check(key, real(c[key]), "a number")
  for key, table in (("beta_schedule", SCHEDULES), ("variance_type", SIGMAS), ("prediction_type", PREDICTS)):
    check(key, str(c[key]) in table, ", ".join(table))
  check("trained_betas", c["trained_betas"] is None, "null")
  for key in ("thresholding", "rescale_betas_zero_snr"): check(key, c[key] is False, "false")
  check("clip_sample", type(c["clip_sample"]) is bool, "true and false")
  check("clip_sample_range", c["clip_sample_range"] == 1 or not c["clip_sample"], "1")
  return {
    "ddpm": {"T": c["num_train_timesteps"], "beta_1": c["beta_start"], "beta_T": c["beta_end"],
             "schedule": SCHEDULES[c["beta_schedule"]], "sigma": SIGMAS[c["variance_type"]],
             "predict": PREDICTS[c["prediction_type"]]},
    "clip": c["clip_sample"]}

# *** folders ***

WEIGHTS = [f"diffusion_pytorch_model{v}.safetensors" for v in ("", ".fp16")]
INDICES = [f"diffusion_pytorch_model.safetensors.index{v}.json" for v in ("", ".fp16")]

def save(folder:str|os.PathLike, model:UNet, meta:dict|None=None):
  """Writes a pipeline that diffusers opens: unet/, scheduler/, model_index.json.

  OSError if it cannot, ValueError for what the layout cannot hold."""
  folder, meta = Path(folder), meta or {}
  config, scheduler = to_diffusers(model, meta)
  state, null = nn.state.get_state_dict(model), meta.get("null_class", True)
  tensors = {theirs: to_theirs(state[ours].float().numpy(), theirs, null) for ours, theirs in diffusers_names(model)}
  write_tensors(folder/"unet"/WEIGHTS[0], tensors, {})
  index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"],
           "unet": ["diffusers", "UNet2DModel"]}
  for name, content in (("unet/config.json", config), ("scheduler/scheduler_config.json", scheduler),
                        ("model_index.json", index)):
    with atomic(folder/name) as f: f.write(json.dumps(content, indent=2).encode() + b"\n")

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
  found = {k: v for f in find_weights(place) for k, v in open_tensors(f)[0].items()}
  meta:dict = {"source": str(folder), "ddpm": {}} | find_scheduler(folder, place)
  try: model = UNet(**args)
  except ValueError as e: raise ValueError(f"{place/'config.json'}: {e}") from e
  state, readers = nn.state.get_state_dict(model), {}
  for ours, name in diffusers_names(model):
    theirs = name
    for new, old in OLD_PARTS.items():
      if name not in found: theirs = theirs.replace(f".{new}.", f".{old}.")
    if theirs not in found: raise ValueError(f"{place} lacks the tensor {name!r}")
    readers[ours] = functools.partial(to_ours, found.pop(theirs), name, state[ours].ndim, null, flip)
  if found:
    more = f" (and {len(found)-1} more)" if len(found) > 1 else ""
    raise ValueError(f"{place} has an unknown tensor {min(found)!r}{more}")
  meta["unet"] = model.config
  if args["num_classes"] and not null: meta["null_class"] = False
  return fill(model, readers, place), meta

def read_json(path:Path) -> dict:
  """A JSON object. OSError, ValueError if it is none."""
  try: value = json.loads(path.read_text(encoding="utf-8"))
  except OSError as e: raise OSError(f"cannot read {path}: {e.strerror or e}") from e
  except (ValueError, RecursionError): raise ValueError(f"{path} is not JSON") from None
  if not isinstance(value, dict): raise ValueError(f"{path} is not a JSON object")
  return value

def find_network(folder:Path, raw:bool=False) -> Path:
  """The folder of the network itself. ValueError if there is none."""
  for part in ("unet", ".") if raw else ("unet_ema", "unet", "."):
    if (folder/part/"config.json").is_file(): return folder/part
  raise ValueError(f"{folder} holds no config.json: it is no model in the diffusers layout")

def find_weights(place:Path) -> list[Path]:
  """The files of its tensors: one, or those of an index. ValueError if there are none."""
  for name in WEIGHTS:
    if (place/name).is_file(): return [place/name]
  for name in INDICES:
    if (place/name).is_file(): return [place/f for f in shards(place/name)]
  for path in sorted(place.glob("*.bin")): refuse_pickle(path)
  raise ValueError(f"{place} holds no {WEIGHTS[0]}")

def shards(index:Path) -> list[str]:
  """The names of the files into which an index divides the tensors."""
  parts = read_json(index).get("weight_map")
  if not isinstance(parts, dict) or not all(isinstance(v, str) and os.path.basename(v) == v for v in parts.values()):
    raise ValueError(f"{index} has no valid weight_map")
  return sorted(set(parts.values()))

def find_scheduler(folder:Path, place:Path) -> dict:
  """What the nearest scheduler_config.json says; that of a training's checkpoint is two folders above its networks."""
  for near in (place, folder, *(above/"scheduler" for above in (place, place.parent, place.parent.parent))):
    path = near/"scheduler_config.json"
    if path.is_file(): return from_scheduler(read_json(path), path)
  return from_scheduler({}, place)

# *** the hub ***

def is_name(text:str) -> bool:
  """Whether it is owner/name or owner/name@revision."""
  return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", text) is not None

def download(name:str) -> Path:
  """The folder of a model on the hub, owner/name or owner/name@revision: where huggingface's own programs have it, or
  in tinygrad's cache, into which it is fetched if it is not there.

  $HF_ENDPOINT, $HF_TOKEN, $HF_HUB_OFFLINE, $HF_HUB_CACHE and $HF_HOME mean what they mean there. OSError, in one
  sentence, when that fails."""
  repo, revision = (name.split("@") + ["main"])[:2]
  folder = Path(helpers.cache_dir)/"downloads"/f"{repo}@{revision.replace('/', '--')}"
  for there in (in_their_cache(repo, revision), folder):
    if complete(there): return there
  if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
    raise OSError(f"{name!r} is not on this machine, and HF_HUB_OFFLINE forbids to ask the hub")
  url = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
  url = f"{url}/{urllib.parse.quote(repo)}/resolve/{urllib.parse.quote(revision, safe='')}"
  def get(file:str) -> bool:
    """Whether the hub has it, and then we too."""
    try: fetch(f"{url}/{file}", folder/file, f"{name}/{file}")
    except urllib.error.HTTPError as e:
      if e.code == 404: return False
      why = ": if it is private or asks for consent, HF_TOKEN must be set" if e.code in (401, 403) else ""
      raise OSError(f"the hub does not give {name!r} ({e.code} {e.reason}){why}") from e
    except OSError as e:
      raise OSError(f"{name!r} is neither a file nor a folder here, and it could not be downloaded from {url}: "
                    f"{e}") from e
    return True
  get("model_index.json")
  place = next((p for p in ("unet/", "") if get(p+"config.json")), None)
  if place is None:
    raise OSError(f"{name!r} is neither a file nor a folder here, and the hub has no config.json of that name (404)")
  for file in ("scheduler/scheduler_config.json", "scheduler_config.json"):
    if get(file): break
  for file in WEIGHTS+INDICES:  # last, so that where they are all is
    if not get(place+file): continue
    missing = [f for f in shards(folder/place/file) if not get(place+f)] if file in INDICES else []
    if missing: raise OSError(f"the hub lacks {missing[0]} of {name!r}")
    return folder
  raise OSError(f"the hub has no {WEIGHTS[0]} of {name!r}, and a pickle is not loaded: if it has a .bin, where PyTorch "
                f"is at hand, {converting('diffusion_pytorch_model.bin')} makes such a file of it")

def in_their_cache(repo:str, revision:str) -> Path:
  """Where huggingface's own programs keep that revision."""
  env = os.environ.get
  home = Path(env("HF_HOME") or Path(env("XDG_CACHE_HOME") or "~/.cache", "huggingface"))
  cache = Path(env("HF_HUB_CACHE") or home/"hub").expanduser()/f"models--{repo.replace('/', '--')}"
  try: commit = (cache/"refs"/revision).read_text().strip()
  except (OSError, ValueError): commit = revision
  return cache/"snapshots"/commit

def complete(folder:Path) -> bool:
  """Whether all of a model is in the folder."""
  try: return all(f.is_file() for f in find_weights(find_network(folder)))
  except (OSError, ValueError): return False

def fetch(url:str, path:Path, desc:str):
  """Downloads a file, which gets its name when it is whole. What broke off is kept and gone on with: at once if some of
  it came, else the next time. OSError if it fails."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part, tag = path.with_name(path.name+".part"), path.with_name(path.name+".etag")
  with open(part, "ab") as f:
    try: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError: raise OSError("another program is downloading it") from None
    except OSError: pass  # a file system without locks
    try:
      while not path.is_file():
        begun = f.tell()
        try: receive(url, f, tag, desc)
        except urllib.error.HTTPError as e:
          if not begun or e.code != 416: raise
          f.truncate(f.seek(0))  # what is here is no part of what is there
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
          if f.tell() <= begun: raise OSError(getattr(e, "reason", e)) from e
        else:
          f.flush()
          os.fsync(f.fileno())
          os.replace(part, path)
          tag.unlink(missing_ok=True)
    finally:
      if not f.tell(): part.unlink(missing_ok=True)

def receive(url:str, f:BinaryIO, tag:Path, desc:str):
  """Appends to f what is missing of it, or all of it anew if it has changed since; `tag` has its version.

  ConnectionError if it breaks off."""
  begun, request = f.tell(), urllib.request.Request(url, headers={"User-Agent": "ddpm"})
  if token := os.environ.get("HF_TOKEN"): request.add_unredirected_header("Authorization", f"Bearer {token}")
  if begun:
    request.add_header("Range", f"bytes={begun}-")
    if tag.is_file() and (version := tag.read_text()): request.add_header("If-Range", version)
  with urllib.request.urlopen(request, timeout=60) as answer:
    if answer.status != 206: begun = f.truncate(f.seek(0))
    tag.write_text(answer.headers.get("ETag") or "")
    rest = int(answer.headers.get("Content-Length") or 0)
    for block in progress(iter(lambda: answer.read1(2**20), b""), desc, rest, len): f.write(block)
  if rest and f.tell() != begun+rest: raise ConnectionError("the connection broke off")
