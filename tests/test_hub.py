"""diffusers' layout and the hub: known answers, what is kept and what is refused, and downloads from a server here."""
import contextlib, fcntl, gzip, http.server, json, os, re, shutil, subprocess, sys, threading
from pathlib import Path
import numpy as np
import pytest
import unet
from common import GOLDEN, ROOT, TINY, arr, close, random_model, refused
from ddpm import DDPM
from engine.batches import tensors
from engine.capture import captured
from files import checkpoint, download, hub
from files.weights import read_tensors, write_tensors
from tinygrad import Context, helpers, nn

WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY_MODEL = unet.UNet(**TINY)

def same(a, b):
  """Two networks have the same weights."""
  ours, theirs = nn.state.get_state_dict(a), nn.state.get_state_dict(b)
  return ours.keys() == theirs.keys() and all(np.array_equal(v.numpy(), theirs[k].numpy()) for k, v in ours.items())

def change(path, **keys):
  """A JSON file with other values; a key whose value is ... is left out."""
  content = json.loads(path.read_text()) | keys
  path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))

# *** networks ***

CASES = ["diffusers_tiny", "diffusers_tiny_old_names", "diffusers_defaults", "diffusers_classes"]

def known(case):
  if not (GOLDEN/case).exists(): pytest.skip("the known answers are not on this machine")
  return checkpoint.load(GOLDEN/case)

@pytest.mark.parametrize("plain", [1, 0])
@pytest.mark.parametrize("case", CASES)
def test_known_answers_of_diffusers(case, plain, monkeypatch):
  monkeypatch.setenv("PLAIN", str(plain))
  model, _ = known(case)
  with np.load(GOLDEN/case/"case.npz") as f: x, t, want, y = f["x"], f["timestep_from_0"]+1, f["eps"], f.get("y")
  step = captured(lambda *given: model(*given).realize())    # fast/ works in captured steps alone
  with Context(NOOPT=plain): out = step(*tensors(x, t, y)).numpy()  # unet.py's loops as they are compile in less time
  assert np.abs(out - want).max() < 1e-5 * np.abs(want).max()

def test_what_the_known_networks_are():
  for case, keys in (("diffusers_tiny", {"head_channels": 0, "norm_eps": 1e-6, "down_pad": 0, "freq_shift": 1}),
                     ("diffusers_defaults", {"head_channels": 8, "norm_eps": 1e-5, "down_pad": 1, "freq_shift": 0})):
    config = known(case)[0].config
    assert {k: config[k] for k in keys} == keys and config["num_classes"] == 0 and config["out_channels"] is None
  meta = known("diffusers_defaults")[1]
  assert meta["ddpm"] == {"T": 1000, "beta_1": 1e-4, "beta_T": 0.02, "schedule": "cosine", "sigma": "beta_tilde",
                          "predict": "eps"} and meta["clip"] is True and "null_class" not in meta
  model, meta = known("diffusers_classes")
  assert meta["ddpm"]["predict"] == "v" and meta["null_class"] is False and model.config["num_classes"] == 6
  assert model.label.shape[0] == 7 and not model.label.numpy()[6].any() and model.label.numpy()[5].any()

@pytest.mark.parametrize("case", CASES)
def test_a_network_of_diffusers_goes_back(case, tmp_path):
  """Every tensor as it was, apart from the order of sines and cosines, which is ours."""
  model, meta = known(case)
  place = hub.find_network(GOLDEN/case)
  hub.save(tmp_path, model, meta)
  theirs, ours = read_tensors(place/WEIGHTS)[0], read_tensors(tmp_path/"unet"/WEIGHTS)[0]
  if case == "diffusers_defaults":
    first, half = theirs["time_embedding.linear_1.weight"], model.config["channels"]//2
    theirs["time_embedding.linear_1.weight"] = np.concatenate([first[:, half:], first[:, :half]], axis=1)
  if case == "diffusers_tiny_old_names":
    assert sorted(v.tobytes() for v in theirs.values()) == sorted(v.tobytes() for v in ours.values())
  else:
    assert theirs.keys() == ours.keys()
    for k, v in theirs.items(): assert np.array_equal(v, ours[k]), k
  before, after = hub.read_json(place/"config.json"), hub.read_json(tmp_path/"unet"/"config.json")
  for k, v in before.items():
    if k not in ("_diffusers_version", "flip_sin_to_cos", "num_train_timesteps"): assert after[k] == v, k
  again, meta_again = checkpoint.load(tmp_path)
  assert same(again, model) and again.config == model.config
  assert {**meta_again, "source": 0} == {**meta, "source": 0}

def test_a_missing_key_is_their_default(tmp_path):
  """Those of diffusers 0.35, of whose defaults this network is made but for its size."""
  known("diffusers_defaults")
  shutil.copytree(GOLDEN/"diffusers_defaults", tmp_path, dirs_exist_ok=True)
  size = ("_class_name", "sample_size", "block_out_channels", "layers_per_block", "down_block_types", "up_block_types",
          "norm_num_groups")
  config = hub.read_json(tmp_path/"unet"/"config.json")
  (tmp_path/"unet"/"config.json").write_text(json.dumps({k: config[k] for k in size}))
  (tmp_path/"scheduler"/"scheduler_config.json").write_text(json.dumps({"beta_schedule": "squaredcos_cap_v2"}))
  (model, meta), (again, meta_again) = known("diffusers_defaults"), checkpoint.load(tmp_path)
  assert again.config == model.config and same(again, model)
  assert meta_again["ddpm"] == meta["ddpm"] and meta_again["clip"] == meta["clip"]
  assert hub.from_diffusers({"sample_size": 64}, tmp_path)["channel_mult"] == (1, 2, 3, 4)

def test_classes_go_there_and_back(tmp_path):
  """With the last for "no class", which config.json says; a file of theirs without it has none, and its last is one."""
  model = random_model(num_classes=3, dropout=0.1)
  hub.save(tmp_path, model, {"ddpm": {"T": 50}})
  config = hub.read_json(tmp_path/"unet"/"config.json")
  assert config["num_class_embeds"] == 4 and config["_null_class"] is True
  table = read_tensors(tmp_path/"unet"/WEIGHTS)[0]["class_embedding.weight"]
  assert np.array_equal(table, model.label.numpy())
  again, meta = checkpoint.load(tmp_path)
  assert same(again, model) and again.config == model.config | {"attn_resolutions": (4,)} and "null_class" not in meta
  change(tmp_path/"unet"/"config.json", _null_class=...)
  again, meta = checkpoint.load(tmp_path)
  assert again.config["num_classes"] == 4 and meta["null_class"] is False
  assert np.array_equal(again.label.numpy(), np.concatenate([table, np.zeros_like(table[:1])]))

def test_a_schedule_that_is_an_array_and_names_and_limits_go_there_and_back(tmp_path):
  model, own = random_model(num_classes=2), np.linspace(0.01, 0.3, 9)
  meta = {"ddpm": {"T": 9, "schedule": own}, "classes": ["cat", "dog"], "limits": [-3.5, 7.0]}
  hub.save(tmp_path/"folder", model, meta)
  checkpoint.save(tmp_path/"a.safetensors", model, meta)
  for path in (tmp_path/"folder", tmp_path/"a.safetensors"):
    again = checkpoint.load(path)[1]
    assert again["ddpm"]["schedule"] == own.tolist()
    assert again["classes"] == ["cat", "dog"] and again["limits"] == [-3.5, 7.0]

@pytest.mark.parametrize("keys", [
  {"image_size": (8, 12), "attn_resolutions": (6,)}, {"in_channels": 5}, {"out_channels": 2}, {"head_channels": 4},
  {"norm_eps": 1e-3, "down_pad": 1, "freq_shift": 0}, {"channel_mult": (1, 2, 4), "attn_resolutions": (8, 2)}])
def test_other_networks_go_there_and_back(keys, tmp_path):
  model = random_model(**keys)
  hub.save(tmp_path, model)
  again = checkpoint.load(tmp_path)[0]
  assert same(again, model) and again.config == model.config

@pytest.mark.parametrize("key, value", [
  ("_class_name", "UNet2DConditionModel"), ("act_fn", "relu"), ("center_input_sample", True),
  ("time_embedding_type", "fourier"), ("time_embedding_dim", 100), ("mid_block_type", None),
  ("mid_block_scale_factor", 2), ("add_attention", False), ("downsample_type", "resnet"), ("upsample_type", "resnet"),
  ("attn_norm_num_groups", 2), ("resnet_time_scale_shift", "scale_shift"), ("class_embed_type", "timestep"),
  ("downsample_padding", 2), ("sample_size", None), ("sample_size", [8, 8, 8]), ("in_channels", "three"),
  ("out_channels", 0), ("layers_per_block", 1.5), ("norm_num_groups", None), ("norm_eps", "small"),
  ("freq_shift", None), ("dropout", True), ("flip_sin_to_cos", None), ("num_class_embeds", -1),
  ("attention_head_dim", 3), ("block_out_channels", [8, 12]), ("block_out_channels", []),
  ("down_block_types", ["SkipDownBlock2D", "DownBlock2D"]), ("down_block_types", ["DownBlock2D"]),
  ("up_block_types", ["UpBlock2D", "UpBlock2D"])])
def test_networks_that_are_refused(key, value):
  config, _ = hub.to_diffusers(TINY_MODEL, {})
  refused(lambda: hub.from_diffusers(config | {key: value}, "x"), f"x: {key} = {value!r} is not supported, only")
  assert hub.from_diffusers(config, "x")["image_size"] == 8

def test_a_refusal_names_the_file(tmp_path):
  hub.save(tmp_path, TINY_MODEL)
  for key, value, words in (("act_fn", "relu", ("act_fn = 'relu'",)), ("sample_size", 9, ("9x9", "divide"))):
    change(tmp_path/"unet"/"config.json", **{key: value})
    refused(lambda: checkpoint.load(tmp_path), tmp_path/"unet"/"config.json", *words)
    change(tmp_path/"unet"/"config.json", act_fn="silu")

def test_other_names_for_the_same_are_taken(tmp_path):
  hub.save(tmp_path, model := random_model())
  change(tmp_path/"unet"/"config.json", act_fn="swish", attn_norm_num_groups=4, time_embedding_dim=32, unheard_of=1,
         optimization_step=7)
  assert same(checkpoint.load(tmp_path)[0], model)

def test_tensors_that_do_not_fit(tmp_path):
  hub.save(tmp_path, random_model())
  file = tmp_path/"unet"/WEIGHTS
  tensors, _ = read_tensors(file)
  for changed, words in (({k: v for k, v in tensors.items() if k != "conv_in.bias"}, ("lacks", "'conv_in.bias'")),
                         (tensors | {"more.a": arr(1), "more.b": arr(1)}, ("unknown", "'more.a' (and 1 more)")),
                         (tensors | {"conv_in.bias": arr(9)}, ("conv_in.bias", "shape")),
                         (tensors | {"conv_in.bias": np.full(8, np.inf, np.float32)}, ("conv_in.bias", "finite"))):
    write_tensors(file, changed, {})
    refused(lambda: checkpoint.load(tmp_path), *words)
  hub.save(tmp_path/"classes", random_model(num_classes=2))
  labels = tmp_path/"classes"/"unet"/WEIGHTS
  write_tensors(labels, read_tensors(labels)[0] | {"class_embedding.weight": np.array(1, np.float32)}, {})
  refused(lambda: checkpoint.load(tmp_path/"classes"), "class_embedding.weight", "shape ()")
  file.unlink()
  refused(lambda: checkpoint.load(tmp_path), "holds no")
  (tmp_path/"unet"/"diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
  refused(lambda: checkpoint.load(tmp_path), "pickle", "torch.load", "diffusion_pytorch_model.safetensors")
  for content in ("[]", "{", "[" * 100_000):
    (tmp_path/"unet"/"config.json").write_text(content)
    refused(lambda: checkpoint.load(tmp_path), "config.json is not")
  (tmp_path/"unet"/"config.json").unlink()
  refused(lambda: checkpoint.load(tmp_path), "no config.json")

def test_what_the_layout_cannot_hold(tmp_path):
  for key, value in (("predict", "mu"), ("sigma", "learned")):
    refused(lambda: hub.save(tmp_path/"none", TINY_MODEL, {"ddpm": {key: value}}), f"{key} = {value!r}")
  refused(lambda: hub.save(tmp_path/"none", nn.Linear(2, 2)), "only a network of this program")
  assert not (tmp_path/"none").exists()

# *** schedulers ***

@pytest.mark.parametrize("ours, theirs", [
  ({"T": 50, "beta_1": 1e-3, "beta_T": 0.3}, {"num_train_timesteps": 50, "beta_start": 1e-3, "beta_end": 0.3}),
  ({"schedule": "quad"}, {"beta_schedule": "scaled_linear"}),
  ({"schedule": "cosine"}, {"beta_schedule": "squaredcos_cap_v2"}),
  ({"sigma": "beta"}, {"variance_type": "fixed_large"}), ({"sigma": "beta_tilde"}, {"variance_type": "fixed_small"}),
  ({"predict": "x0"}, {"prediction_type": "sample"}), ({"predict": "eps"}, {"prediction_type": "epsilon"}),
  ({"predict": "v"}, {"prediction_type": "v_prediction"})])
def test_schedulers_go_there_and_back(ours, theirs, tmp_path):
  model = TINY_MODEL
  for clip in (True, False):
    hub.save(tmp_path, model, {"ddpm": ours, "clip": clip})
    written = hub.read_json(tmp_path/"scheduler"/"scheduler_config.json")
    assert {k: written[k] for k in theirs} == theirs and written["clip_sample"] is clip
    meta = checkpoint.load(tmp_path)[1]
    assert {k: meta["ddpm"][k] for k in ours} == ours and meta["clip"] is clip

def test_what_numpy_gives_is_written_as_json_has_it(tmp_path):
  meta = {"ddpm": {"T": np.int64(9), "beta_T": np.float32(0.5)}, "classes": np.array(["a", "b"]), "clip": np.True_}
  hub.save(tmp_path, random_model(num_classes=np.int64(2)), meta)
  net, found = checkpoint.load(tmp_path)
  assert found["classes"] == ["a", "b"] and found["ddpm"]["T"] == 9 and net.config["num_classes"] == 2
  checkpoint.save(tmp_path/"a.safetensors", net, meta | {"dataset": tmp_path})
  assert checkpoint.load(tmp_path/"a.safetensors")[1]["dataset"] == str(tmp_path)

def test_the_same_betas():
  """Each of their schedules by its formula in diffusers."""
  def bar(u): return np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
  i = np.arange(100) / 100
  for name, beta in (("linear", np.linspace(1e-4, 0.02, 100)), ("scaled_linear", np.linspace(0.01, 0.02**0.5, 100)**2),
                     ("squaredcos_cap_v2", np.minimum(1 - bar(i + 0.01) / bar(i), 0.999))):
    meta = hub.from_scheduler({"num_train_timesteps": 100, "beta_schedule": name}, "x")
    close(DDPM(**meta["ddpm"]).beta[1:], beta, rtol=1e-9)

@pytest.mark.parametrize("settings", [
  {"schedule": "const", "beta_T": 0.3}, {"schedule": "geometric", "beta_1": 4e-6, "beta_T": 0.2},
  {"schedule": [0.1, 0.5, 0.2, 0.3, 0.25, 0.01, 0.02, 0.03, 0.9]}])
def test_schedules_without_a_name_there_are_lists(settings, tmp_path):
  hub.save(tmp_path, TINY_MODEL, {"ddpm": settings | {"T": 9}})
  listed = hub.read_json(tmp_path/"scheduler"/"scheduler_config.json")["trained_betas"]
  a = np.cumprod(1 - np.array(listed))
  if settings["schedule"] == "geometric":
    close(np.log(a/(1-a)), np.log((1-4e-6)/4e-6) + np.arange(9)*np.log(0.8), rtol=1e-9)  # falls evenly
  else: close(listed, 9*[0.3] if settings["schedule"] == "const" else settings["schedule"])
  again = DDPM(**checkpoint.load(tmp_path)[1]["ddpm"])
  assert np.array_equal(again.beta[1:], listed) and again.every([9, 4, 0]).T == 2

def test_the_density_model_as_diffusers_has_it(tmp_path):
  """ᾱ at three times as diffusers' DDPMScheduler computes it in float32 from the file."""
  hub.save(tmp_path, *checkpoint.load(ROOT/"checkpoints"/"mnist-density.safetensors"))
  beta = DDPM(**checkpoint.load(tmp_path)[1]["ddpm"]).beta
  close(np.cumprod(1 - beta)[[1, 500, 1000]], [0.999996006, 0.862784684, 0.000154803245], rtol=1e-4)

@pytest.mark.parametrize("key, value", [
  ("_class_name", "ScoreSdeVeScheduler"), ("num_train_timesteps", 0), ("beta_start", "a"), ("beta_schedule", "sigmoid"),
  ("variance_type", "learned"), ("variance_type", "learned_range"), ("variance_type", "fixed_large_log"),
  ("prediction_type", "flow"), ("trained_betas", [0.1, 0.2]), ("trained_betas", "a"), ("thresholding", True),
  ("rescale_betas_zero_snr", True), ("clip_sample", "yes"), ("clip_sample_range", 2.0)])
def test_schedulers_that_are_refused(key, value):
  _, config = hub.to_diffusers(TINY_MODEL, {})
  refused(lambda: hub.from_scheduler(config | {key: value}, "x"), f"x: {key} = {value!r} is not supported, only")
  assert hub.from_scheduler(config, "x")["clip"] is True

def test_what_of_a_scheduler_does_not_matter(tmp_path):
  hub.save(tmp_path, TINY_MODEL)
  change(tmp_path/"scheduler"/"scheduler_config.json", timestep_spacing="trailing", steps_offset=1, clip_sample=False,
         clip_sample_range=2.0, _class_name="DDIMScheduler", variance_type="fixed_small_log")
  assert checkpoint.load(tmp_path)[1]["ddpm"]["sigma"] == "beta_tilde"

# *** layouts ***

def test_a_checkpoint_of_their_training(tmp_path):
  """Its averaged weights, or with `raw` the others; the scheduler is in the folder above, where the pipeline is."""
  averaged, raw, whole = random_model(), random_model(seed=1), random_model(seed=2)
  hub.save(tmp_path, whole, {"ddpm": {"T": 7}})
  for name, model in (("unet_ema", averaged), ("unet", raw)):
    hub.save(tmp_path/"of", model)
    shutil.move(tmp_path/"of"/"unet", tmp_path/"checkpoint-500"/name)
  for folder, want in ((tmp_path, whole), (tmp_path/"checkpoint-500", averaged), (tmp_path/"checkpoint-500/unet", raw)):
    model, meta = checkpoint.load(folder)
    assert same(model, want) and meta["ddpm"]["T"] == 7
  assert same(checkpoint.load(tmp_path/"checkpoint-500", raw=True)[0], raw)
  assert same(checkpoint.load(tmp_path, raw=True)[0], whole)

def test_half_precision(tmp_path):
  hub.save(tmp_path, model := random_model())
  tensors, _ = read_tensors(tmp_path/"unet"/WEIGHTS)
  write_tensors(tmp_path/"unet/diffusion_pytorch_model.fp16.safetensors",
                {k: -v.astype(np.float16) for k, v in tensors.items()}, {})
  assert same(checkpoint.load(tmp_path)[0], model)  # the others come first
  shutil.copytree(tmp_path, tmp_path/"parts", ignore=shutil.ignore_patterns("parts"))
  divide(tmp_path/"parts"/"unet", f"{WEIGHTS}.index.json")
  assert same(checkpoint.load(tmp_path/"parts")[0], model)  # also where they are in parts
  (tmp_path/"unet"/WEIGHTS).unlink()
  again = nn.state.get_state_dict(checkpoint.load(tmp_path)[0])
  for k, v in nn.state.get_state_dict(model).items(): close(again[k].numpy(), -v.numpy(), rtol=1e-3, atol=1e-6)

def divide(place, index):
  """Two files and an index instead of one."""
  tensors, _ = read_tensors(place/WEIGHTS)
  names = {k: f"part-{i % 2}.safetensors" for i, k in enumerate(tensors)}
  for part in set(names.values()):
    write_tensors(place/part, {k: v for k, v in tensors.items() if names[k] == part}, {})
  (place/index).write_text(json.dumps({"weight_map": names}))
  (place/WEIGHTS).unlink()

@pytest.mark.parametrize("index", [f"{WEIGHTS}.index.json", f"{WEIGHTS}.index.fp16.json"])
def test_files_that_are_divided(index, tmp_path):
  hub.save(tmp_path, model := random_model())
  divide(tmp_path/"unet", index)
  assert same(hub.load(tmp_path)[0], model)
  tensors = read_tensors(tmp_path/"unet"/"part-0.safetensors")[0]
  write_tensors(tmp_path/"unet"/"part-1.safetensors", tensors, {})
  refused(lambda: hub.load(tmp_path), "is in two of the files", next(iter(tensors)))
  (tmp_path/"unet"/"part-1.safetensors").unlink()
  refused(lambda: hub.load(tmp_path), "part-1")
  for parts in ({"a": "../b.safetensors"}, {"a": 1}, 5):
    (tmp_path/"unet"/index).write_text(json.dumps({"weight_map": parts}))
    refused(lambda: hub.load(tmp_path), "weight_map")

def test_what_else_a_file_says_of_its_images_comes_back(tmp_path):
  said = {"classes": ["a", "b"], "untrained": [0], "span": [0, 4095], "how": {"size": [8, 8], "fit": "pad"}}
  hub.save(tmp_path, random_model(num_classes=2), said)
  assert checkpoint.load(tmp_path)[1].items() >= said.items()
  (tmp_path/"unet_ema").mkdir()
  refused(lambda: hub.save(tmp_path, TINY_MODEL), "unet_ema")

def test_a_target_by_its_old_name(tmp_path):
  for more, want in (({"predict_epsilon": False}, "x0"), ({"predict_epsilon": True}, "eps"),
                     ({"predict_epsilon": False, "prediction_type": "v_prediction"}, "v")):
    assert hub.from_scheduler(more, tmp_path)["ddpm"]["predict"] == want

def test_a_pipeline_of_more_is_refused(tmp_path):
  hub.save(tmp_path, TINY_MODEL)
  change(tmp_path/"model_index.json", vqvae=["diffusers", "VQModel"])
  refused(lambda: checkpoint.load(tmp_path), "vqvae = ['diffusers', 'VQModel'] is not supported")

# *** the hub ***

@pytest.fixture
def server(tmp_path, monkeypatch):
  """A hub on this machine: /owner/name/resolve/revision/file is the file in .files. Those in .broken break off in the
  middle, as often as said; .private wants the token "secret"; .log has each request's file, status and Range."""
  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
      owner, name, _, revision, file = self.path[1:].split("/", 4)
      key, headers, status = f"{owner}/{name}@{revision}/{file}", {}, 200
      allowed = owner != "private" or self.headers.get("Authorization") == "Bearer secret"
      body = server.files.get(key, b"none")
      if not allowed: status, body = 401, b"no"
      elif key not in server.files: status = 404
      else:
        headers["ETag"] = f'"{hash(body)}"'
        begin = self.headers.get("Range")
        if begin and self.headers.get("If-Range") == headers["ETag"]:
          at = int(re.fullmatch(r"bytes=(\d+)-", begin).group(1))
          headers["Content-Range"] = f"bytes {at}-{len(body)-1}/{len(body)}"
          status = 206 if at < len(body) else 416
          body = body[at:]
      server.log.append((file, status, self.headers.get("Range")))
      self.send_response(status)
      for k, v in {**headers, "Content-Length": str(len(body))}.items(): self.send_header(k, v)
      self.end_headers()
      if status < 300 and server.broken.get(file, 0) > 0:
        server.broken[file] -= 1
        body, self.close_connection = body[:len(body)//2], True
      with contextlib.suppress(OSError): self.wfile.write(body)
    def log_message(self, *_): pass
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  server.files, server.broken, server.log = {}, {}, []
  threading.Thread(target=server.serve_forever, daemon=True).start()
  for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"): monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
  monkeypatch.setenv("HF_HOME", str(tmp_path/"huggingface"))
  monkeypatch.setenv("no_proxy", "*")
  monkeypatch.setattr(helpers, "cache_dir", str(tmp_path/"cache"))
  yield server
  server.shutdown()
  server.server_close()

def publish(server, tmp_path, name, model, meta=None, without=()):
  """A pipeline on the hub."""
  folder = tmp_path/"published"
  shutil.rmtree(folder, ignore_errors=True)
  hub.save(folder, model, meta)
  for path in folder.rglob("*"):
    file = str(path.relative_to(folder))
    if path.is_file() and file not in without: server.files[f"{name}/{file}"] = path.read_bytes()
  return folder

def test_a_pipeline_from_the_hub(server, tmp_path, monkeypatch):
  model, other = random_model(), random_model(seed=1)
  publish(server, tmp_path, "owner/name@main", model, {"ddpm": {"T": 7}, "clip": False})
  publish(server, tmp_path, "owner/name@v1.0", other)
  again, meta = checkpoint.load("owner/name")
  assert same(again, model) and meta["ddpm"]["T"] == 7 and meta["clip"] is False
  asked = len(server.log)
  assert same(checkpoint.load("owner/name")[0], model) and len(server.log) == asked  # it is here now
  assert same(checkpoint.load("owner/name@v1.0")[0], other)
  monkeypatch.setenv("HF_HUB_OFFLINE", "true")
  assert same(checkpoint.load("owner/name")[0], model)
  left = {p.name for p in (tmp_path/"cache").rglob("*") if p.is_file()}
  assert left == {WEIGHTS, "config.json", "scheduler_config.json", "model_index.json"}

def test_a_diffusion_that_nothing_tells_of_is_said(tmp_path, capsys):
  hub.save(tmp_path/"a", random_model(), {})
  checkpoint.load(tmp_path/"a")
  assert capsys.readouterr().err == ""
  (tmp_path/"a"/"scheduler"/"scheduler_config.json").unlink()
  assert checkpoint.load(tmp_path/"a")[1]["ddpm"]["T"] == 1000
  assert "no scheduler_config.json" in capsys.readouterr().err

def test_a_network_alone_from_the_hub(server, tmp_path):
  """As google's: all in one folder."""
  publish(server, tmp_path, "google/x@main", model := random_model(), {"ddpm": {"T": 7}})
  server.files = {re.sub("@main/(unet|scheduler)/", "@main/", k): v for k, v in server.files.items()}
  again, meta = checkpoint.load("google/x")
  assert same(again, model) and meta["ddpm"]["T"] == 7

def test_divided_files_from_the_hub(server, tmp_path):
  folder = publish(server, tmp_path, "owner/name@main", model := random_model(), without=(f"unet/{WEIGHTS}",))
  divide(folder/"unet", f"{WEIGHTS}.index.json")
  for path in (folder/"unet").iterdir(): server.files[f"owner/name@main/unet/{path.name}"] = path.read_bytes()
  part = server.files.pop("owner/name@main/unet/part-1.safetensors")
  refused(lambda: checkpoint.load("owner/name"), "part-1.safetensors", "'owner/name'")
  server.files["owner/name@main/unet/part-1.safetensors"] = part
  assert same(checkpoint.load("owner/name")[0], model)

def test_a_private_one(server, tmp_path, monkeypatch):
  publish(server, tmp_path, "private/name@main", model := random_model())
  refused(lambda: checkpoint.load("private/name"), "'private/name'", "401", "HF_TOKEN")
  monkeypatch.setenv("HF_TOKEN", "secret")
  assert same(checkpoint.load("private/name")[0], model)

def test_the_token_stays_with_the_hub(server, tmp_path, monkeypatch):
  """It goes along to where a model has moved within the hub, but not to another host that has the file."""
  seen = []
  class Moved(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      away = f"http://127.0.0.1:{elsewhere.server_port}/file"
      place = {(hub_server, "/file"): "/moved", (hub_server, "/moved"): away}
      self.send_response(307 if (self.server, self.path) in place else 200)
      if to := place.get((self.server, self.path)): self.send_header("Location", to)
      seen.append(self.headers.get("Authorization"))
      self.send_header("Content-Length", "2")
      self.end_headers()
      self.wfile.write(b"{}")
    def log_message(self, *_): pass
  hub_server, elsewhere = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Moved) for _ in range(2)]
  for s in (hub_server, elsewhere): threading.Thread(target=s.serve_forever, daemon=True).start()
  monkeypatch.setenv("HF_TOKEN", "secret\n")
  download.fetch(f"http://127.0.0.1:{hub_server.server_port}/file", tmp_path/"file.json", "file")
  for s in (hub_server, elsewhere): s.shutdown(), s.server_close()
  assert seen == ["Bearer secret", "Bearer secret", None] and (tmp_path/"file.json").read_bytes() == b"{}"

@pytest.mark.parametrize("file, wrong", [
  (f"unet/{WEIGHTS}", lambda body: body[:-10]), (f"unet/{WEIGHTS}", lambda body: body + b"x"),
  (f"unet/{WEIGHTS}", lambda body: b""), ("unet/config.json", lambda body: b"<html>log in</html>"),
  ("model_index.json", gzip.compress)])
def test_what_is_no_such_file_is_not_kept(file, wrong, server, tmp_path):
  publish(server, tmp_path, "owner/name@main", model := random_model())
  body, key = server.files[f"owner/name@main/{file}"], f"owner/name@main/{file}"
  server.files[key] = wrong(body)
  refused(lambda: checkpoint.load("owner/name"), "'owner/name'", f"its answer for {Path(file).name} is")
  assert not [p for p in (tmp_path/"cache").rglob("*") if p.name.startswith(Path(file).name)]
  server.files[key] = body
  assert same(checkpoint.load("owner/name")[0], model)

def test_averaged_weights_on_the_hub(server, tmp_path):
  """Those of unet_ema/, or with `raw` those of unet/, whichever came first."""
  averaged, raw = random_model(), random_model(seed=1)
  publish(server, tmp_path, "owner/name@main", averaged)
  server.files |= {k.replace("/unet/", "/unet_ema/"): v for k, v in server.files.items()}
  publish(server, tmp_path, "owner/name@main", raw)
  for choice in (True, False, True): assert same(checkpoint.load("owner/name", choice)[0], raw if choice else averaged)

def test_one_that_is_not_there(server, tmp_path, monkeypatch):
  refused(lambda: checkpoint.load("owner/none"), "'owner/none'", "404", "neither a file nor a folder")
  assert not [p for p in (tmp_path/"cache").rglob("*") if p.is_file()]
  publish(server, tmp_path, "owner/pickle@main", random_model(), without=(f"unet/{WEIGHTS}",))
  refused(lambda: checkpoint.load("owner/pickle"), "'owner/pickle'", "pickle", "torch.load")
  monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
  refused(lambda: checkpoint.load("owner/none"), "'owner/none'", "127.0.0.1:9", "refused")
  assert not [p for p in (tmp_path/"cache/downloads/owner").glob("none*/**/*") if p.is_file()]

def test_one_that_breaks_off_is_resumed(server, tmp_path):
  """At once, from where it broke off."""
  publish(server, tmp_path, "owner/name@main", model := random_model())
  size = len(server.files[f"owner/name@main/unet/{WEIGHTS}"])
  server.broken[f"unet/{WEIGHTS}"] = 2
  assert same(checkpoint.load("owner/name")[0], model)
  asked = [entry[1:] for entry in server.log if entry[0] == f"unet/{WEIGHTS}"]
  assert asked == [(200, None), (206, f"bytes={size//2}-"), (206, f"bytes={size//2 + (size-size//2)//2}-")]

def test_what_another_program_left_is_gone_on_with(server, tmp_path):
  """If it is of the same version, else all of it comes anew; never is half of it taken for the whole."""
  publish(server, tmp_path, "owner/name@main", model := random_model())
  body, place = server.files[f"owner/name@main/unet/{WEIGHTS}"], tmp_path/"cache/downloads/owner/name@main/unet"
  for tag, left, status in ((f'"{hash(body)}"', body[:1000], 206), ('"older"', b"x" * 1000, 200),
                            (f'"{hash(body)}"', body + b"x", 416), (f'"{hash(body)}"', body, 416)):
    server.log.clear()
    place.mkdir(parents=True)
    (place/f"{WEIGHTS}.part").write_bytes(left)
    (place/f"{WEIGHTS}.etag").write_text(tag)
    assert same(checkpoint.load("owner/name")[0], model)
    asked = [entry[1:] for entry in server.log if entry[0] == f"unet/{WEIGHTS}"]
    assert asked == [(status, f"bytes={len(left)}-")] + [(200, None)] * (len(left) > len(body))  # the whole is taken
    assert sorted(p.name for p in place.iterdir()) == ["config.json", WEIGHTS]
    shutil.rmtree(tmp_path/"cache")

def test_of_two_programs_one_downloads_and_the_other_waits(server, tmp_path, capsys):
  publish(server, tmp_path, "owner/name@main", model := random_model())
  place = tmp_path/"cache/downloads/owner/name@main/unet"
  place.mkdir(parents=True)
  other = open(place/f"{WEIGHTS}.part", "ab")  # noqa: SIM115
  fcntl.flock(other, fcntl.LOCK_EX)
  threading.Timer(0.5, other.close).start()
  assert same(checkpoint.load("owner/name")[0], model)
  assert other.closed and "waiting for another program" in capsys.readouterr().err

def test_a_failed_download_is_kept_and_is_no_model(server, tmp_path, monkeypatch):
  publish(server, tmp_path, "owner/name@main", model := random_model())
  body = server.files[f"owner/name@main/unet/{WEIGHTS}"]
  receive = download.receive
  def breaks(url, f, tag, desc):
    if not url.endswith(WEIGHTS): return receive(url, f, tag, desc)
    if not f.tell(): f.write(body[:5000]), tag.write_text(f'"{hash(body)}"')
    raise ConnectionError("the network is gone")
  with monkeypatch.context() as m:
    m.setattr(download, "receive", breaks)
    refused(lambda: checkpoint.load("owner/name"), "'owner/name'", "the network is gone")
  place = tmp_path/"cache/downloads/owner/name@main/unet"
  assert not (place/WEIGHTS).exists() and (place/f"{WEIGHTS}.part").stat().st_size == 5000
  assert same(checkpoint.load("owner/name")[0], model)
  assert (f"unet/{WEIGHTS}", 206, "bytes=5000-") in server.log

@pytest.mark.parametrize("variable, cache", [("HF_HOME", "home/hub"), ("HF_HUB_CACHE", "cache of hubs")])
def test_one_in_the_cache_of_huggingface(variable, cache, server, tmp_path, monkeypatch):
  """It is not asked for, with HF_HUB_OFFLINE or without."""
  monkeypatch.setenv(variable, str(tmp_path/cache.split("/")[0]))
  there = tmp_path/cache/"models--owner--name"
  hub.save(there/"snapshots"/"abc123", model := random_model())
  (there/"refs").mkdir()
  (there/"refs"/"main").write_text("abc123")
  for name in ("owner/name", "owner/name@main", "owner/name@abc123"): assert same(checkpoint.load(name)[0], model)
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  assert same(checkpoint.load("owner/name")[0], model)
  refused(lambda: checkpoint.load("owner/other"), "'owner/other'", "HF_HUB_OFFLINE")
  assert not server.log
  monkeypatch.setenv("HF_HUB_OFFLINE", "0")
  (there/"snapshots"/"abc123"/"scheduler"/"scheduler_config.json").unlink()
  # other programs may fetch the network without its diffusion
  without = f"unet/{WEIGHTS}", "unet/config.json"
  publish(server, tmp_path, "owner/name@main", model, {"ddpm": {"T": 7}}, without)
  with monkeypatch.context() as m:
    m.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert checkpoint.load("owner/name")[1]["ddpm"]["T"] == 1000  # nor can it be asked
  again, meta = checkpoint.load("owner/name")
  assert same(again, model) and meta["ddpm"]["T"] == 7 and server.log
  shutil.rmtree(tmp_path/"cache")
  server.files.clear()
  (there/"snapshots"/"abc123"/"unet"/WEIGHTS).unlink()  # a snapshot without its weights is no model
  refused(lambda: checkpoint.load("owner/name"), "owner/name", f"no {WEIGHTS}")

def test_what_is_a_name():
  for name in ("google/ddpm-cifar10-32", "a/b@main", "a/b.c@refs/pr/1", "a_b/c@v1.0"): assert download.is_name(name)
  for name in ("runs/", "../a", "a/..", "a", "a/b/c", "a/b@", "/a/b", "a/b@/c"): assert not download.is_name(name)

@pytest.mark.slow
def test_a_name_on_the_hub_draws(server, tmp_path):
  publish(server, tmp_path, "owner/name@main", random_model(), {"ddpm": {"T": 3, "beta_T": 0.5}})
  out, env = tmp_path/"out.png", os.environ | {"XDG_CACHE_HOME": str(tmp_path/"xdg"), "CACHEDB": helpers.CACHEDB}
  command = [sys.executable, "sample.py", "--checkpoint", "owner/name", "--n", "2", "--out", out]
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
  assert done.returncode == 0 and out.stat().st_size > 100, done.stderr
  assert list((tmp_path/"xdg").rglob(WEIGHTS))
