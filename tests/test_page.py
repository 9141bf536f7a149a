"""The page of a model: what its kernels compute in a real browser, on a WebGPU in software, beside Python's."""
import contextlib, itertools, json, os, shutil, subprocess, sys, time
import numpy as np
import pytest
import sample
from common import ROOT, close, f32, random_model, refused
from ddpm import DDPM
from engine import streams
from extras.guidance import labelling
from tinygrad import nn
from tools import page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = """--headless --no-sandbox --disable-gpu-sandbox --disable-background-networking --no-first-run --disable-sync
--disable-component-update --enable-unsafe-webgpu --use-webgpu-adapter=swiftshader --enable-features=Vulkan
--remote-debugging-pipe""".split()

@contextlib.contextmanager
def opened(url, folder):
  """Opens the page in Chromium: a function that sends a command of the DevTools protocol, and the events so far."""
  (to_browser, mine), (theirs, from_browser) = os.pipe(), os.pipe()
  def inherited():  # the protocol's two ends are descriptors 3 and 4
    for old, new in ((to_browser, 100), (from_browser, 101), (100, 3), (101, 4)): os.dup2(old, new)
  browser = subprocess.Popen([CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"], preexec_fn=inherited,
                             close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  for end in (to_browser, from_browser): os.close(end)
  numbers, events, answers, session = itertools.count(1), [], open(theirs, "rb"), {}
  def messages():
    text = b""
    while byte := answers.read1(65536):
      *whole, text = (text + byte).split(b"\0")
      yield from map(json.loads, whole)
  said = messages()
  def send(method, **params):
    os.write(mine, json.dumps(dict(id=(n := next(numbers)), method=method, params=params, **session)).encode() + b"\0")
    for message in said:
      if message.get("id") != n: events.append(message)
      elif "error" in message: raise RuntimeError(message["error"])
      else: return message["result"]
    raise RuntimeError("the browser is gone")
  try:
    target = send("Target.createTarget", url="about:blank")["targetId"]
    session["sessionId"] = send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"): send(f"{domain}.enable")
    send("Page.navigate", url=url)
    yield send, events
  finally:
    browser.kill()
    browser.wait()
    answers.close()
    os.close(mine)

def value(send, code):
  return send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)["result"].get("value")

def needs_gpu(send):
  if not value(send, "navigator.gpu?.requestAdapter().then(found => !!found)"):
    pytest.skip("this Chromium has no WebGPU in software")

def until(send, code, seconds=120):
  """What the page's code is as soon as it is true."""
  ends = time.monotonic() + seconds
  while not (found := value(send, code)):
    assert time.monotonic() < ends, value(send, "document.getElementById('status').textContent")
    time.sleep(0.1)
  return found

# *** what the page is ***

def written(path, ddpm, meta=None, **config):
  """Writes the page of a small random network: what Python's samplers are given as well."""
  net = random_model(**config)
  path.write_text(page.make(net, ddpm, {"ddpm": {"schedule": "linear"}, "dataset": "dots", **(meta or {})}))
  return path.as_uri()

@pytest.fixture(scope="module")
def digits(tmp_path_factory):
  """A page of three classes, and what Python draws with its seed 3 in ten steps of class 1, with guidance 1.5."""
  ddpm, folder = DDPM(T=40, beta_T=0.3), tmp_path_factory.mktemp("page")
  url = written(folder/"page.html", ddpm, dict(step=7, classes=["dot", "cross", "ring"]), num_classes=3)
  net = random_model(num_classes=3)
  for p in nn.state.get_parameters(net): p.replace(f32(p.numpy().astype(np.float16)))
  model = labelling(net, 1.5)(np.ones(2, np.int32))
  *steps, = sample.sample_ddpm(ddpm, model, sample.draw_x_T(2, (1, 8, 8), seed=3), 10, seed=3)
  return url, folder, [[v.numpy() for v in step[1:]] for step in steps]

def test_a_file_of_readable_size():
  for name, most in (("page.py", 120), ("page.html", 120), ("page.js", 285)):
    lines = (ROOT/"tools"/name).read_text().splitlines()
    assert len(lines) <= most and max(map(len, lines)) <= 120, name

@pytest.mark.parametrize("word, ddpm, config", [
  ("mu", DDPM(predict="mu"), {}), ("learned", DDPM(sigma="learned"), {"out_channels": 2}),
  ("channels, not of 2", DDPM(), {"in_channels": 2})])
def test_what_the_page_does_not_know_is_refused_by_name(word, ddpm, config):
  refused(lambda: page.make(random_model(**config), ddpm, {}), word)

def test_weights_that_16_bits_cannot_hold_are_refused():
  net = random_model()
  net.time1.bias.replace(f32(net.time1.bias.numpy() + 1e6))
  refused(lambda: page.make(net, DDPM(), {}), "16 bits")

@pytest.mark.parametrize("command", (["tools/page.py"], ["-m", "tools.page"]))
def test_both_ways_to_start_it_and_a_place_that_cannot_be_written(command, tmp_path):
  (tmp_path/"file").write_text("")
  r = subprocess.run([sys.executable, *command, "--out", tmp_path/"file"/"page.html"], cwd=ROOT, capture_output=True,
                     text=True)
  assert r.returncode == 1 and r.stderr.count("\n") == 1 and "cannot write" in r.stderr, r.stderr

# *** in a browser ***

in_browser = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
TEXT = "document.getElementById({!r}).textContent"
STATUS = TEXT.format("status")

def compared(url, folder):
  """What #test says. The page asks no other address, and no error is on its console."""
  with opened(f"{url}#test", folder) as (send, events):
    needs_gpu(send)
    found = json.loads(until(send, TEXT.format("test")))
  assert not problems(events)
  return found["made"]

def problems(events):
  """What is wrong by the console, and what was asked of other addresses."""
  asked = [e["params"]["request"]["url"] for e in events if e.get("method") == "Network.requestWillBeSent"]
  said = [e["params"] for e in events if e.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled")
          or e.get("method") == "Log.entryAdded" and e["params"]["entry"]["level"] == "error"]
  return said + [a for a in asked if a.split("#")[0] != asked[0].split("#")[0] and not a.startswith("data:")]

@in_browser
def test_the_page_draws_what_python_draws(digits, tmp_path):
  found = compared(digits[0], tmp_path)
  assert [(m["sampler"], m["w"], m["steps"]) for m in found] == [("ddpm", 2, 10), ("ddim", 2, 10)]
  assert max(m["difference"] for m in found) < 2e-3

@in_browser
def test_colours_v_and_no_clipping(tmp_path):
  ddpm = DDPM(T=30, beta_T=0.3, schedule="cosine", sigma="beta_tilde", predict="v")
  url = written(tmp_path/"page.html", ddpm, {"clip": False}, in_channels=3, image_size=(8, 4), channel_mult=(1,),
                attn_resolutions=())
  found = compared(url, tmp_path/"browser")
  assert [m["w"] for m in found] == [1, 1] and max(m["difference"] for m in found) < 2e-3

def pixels(send, canvas):
  """The levels of a canvas: of image i in one view, 2i is x_t and 2i + 1 is x̂_0."""
  return np.array(value(send, f"[...document.querySelectorAll('canvas')[{canvas}].getContext('2d')"
                        ".getImageData(0, 0, 8, 8).data]"))[::4]

@in_browser
def test_its_controls(digits, tmp_path):
  """Seed, class and guidance; two images in ten steps, as Python's; back to the noise; the second part; no WebGPU."""
  url, _, steps = digits
  press = "document.getElementById({!r}).click()"
  with opened(url, tmp_path) as (send, events):
    needs_gpu(send)
    until(send, f"{STATUS}.startsWith('Ready')")
    for name, to in (("seed", 3), ("class", 1), ("w", 1.5)):
      value(send, f"e = document.getElementById({name!r}), e.value = {to}, e.onchange()")
    assert value(send, TEXT.format("python")).endswith("--seed 3 --steps 10 --guidance 1.5 --n 8 --class cross")
    value(send, press.format("draw"))
    until(send, "document.querySelector('li:last-child').className === 'lit'")
    assert value(send, STATUS).startswith("Step 10 of 10")
    def compare(k):  # what is seen after step k, of two images
      value(send, f"e = document.querySelector('.walk'), e.value = {k}, e.oninput()")
      for image, row in itertools.product((0, 1), (0, 1)):
        levels = np.clip((steps[k-1][row][image].ravel() + 1) * 127.5, 0, 255)
        close(pixels(send, 2*image + row), levels, atol=1)
    compare(10)
    compare(4)
    value(send, press.format("copy"))  # it becomes the second part's x_0, and under Eq. 4's noise its x_t
    value(send, "e = document.getElementById('t'), e.value = 17, e.oninput()")
    x_t, copied = pixels(send, 17), pixels(send, 18)  # after the drawing itself, which is a canvas too
    assert value(send, TEXT.format("t_is")) == "20" and np.corrcoef(copied, pixels(send, 0))[0, 1] > 0.7
    x_0, eps = f32(copied.reshape(1, 1, 8, 8) / 127.5 - 1), sample.draw_x_T(1, (1, 8, 8), seed=3)
    x_20 = DDPM(T=40, beta_T=0.3).q_sample(x_0, 20, eps).numpy().ravel()
    close(x_t, np.clip((x_20 + 1) * 127.5, 0, 255), atol=1)
    value(send, press.format("denoise"))
    until(send, f"{STATUS}.startsWith('Step 5 of 5')")
    value(send, press.format("one"))
    said = until(send, f"{STATUS}.startsWith('Step 1 of 10') && {STATUS}")
    time.sleep(0.2 + 3 * int(said.split()[4]) / 1000)
    assert value(send, STATUS) == said and value(send, TEXT.format("pause")) == "Go on"
    assert not problems(events)
    send("Page.addScriptToEvaluateOnNewDocument",
         source="Object.defineProperty(navigator, 'gpu', { value: undefined })")
    send("Page.reload")
    assert "Chrome" in until(send, f"{STATUS}.includes('WebGPU') && {STATUS}")

@in_browser
def test_its_random_numbers_are_numpys(tmp_path):
  """Of the streams of engine/streams.py, enough of them to reach each branch of the ziggurat."""
  script = (ROOT/"tools"/"page.js").read_text()
  script = script[script.index("// *** numpy's"):script.index("const normals")]
  with opened("about:blank", tmp_path) as (send, _):
    for seed, use, image in ((0, 1, 0), (2**31 - 1, 2, 7)):
      made = value(send, f"{{ {script} next = stream({seed}, {use}, {image}); [...Array(30000)].map(() => next()) }}")
      known = streams.stream(seed, streams.USES[use], image).standard_normal(30000, np.float32)
      assert (np.abs(known) > 3.66).sum() > 3
      close(made, known, rtol=1e-6)
