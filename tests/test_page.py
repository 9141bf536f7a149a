"""The page of a model: what its kernels compute in a real browser, on a WebGPU in software, beside Python's."""
import itertools, json, os, shutil, subprocess, sys, time
import numpy as np
import pytest
from common import ROOT, close, f32, random_model, refused
from ddpm import DDPM
from tools import page
pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = """--headless --no-sandbox --disable-gpu-sandbox --disable-background-networking --no-first-run --disable-sync
--disable-component-update --enable-unsafe-webgpu --use-webgpu-adapter=swiftshader --enable-features=Vulkan
--remote-debugging-pipe""".split()
DIGITS = DDPM(T=40, beta_T=0.3)

def written(path, ddpm, meta, **config):
  """Writes the page of a small random network; its address."""
  path.write_text(page.make(random_model(**config), ddpm, {"ddpm": {"schedule": "linear"}, "dataset": "dots", **meta}))
  return path.as_uri()

@pytest.fixture(scope="module")
def digits(tmp_path_factory):
  """The address of a page of three classes, of a network with attention, two sizes and as few channels as can be."""
  classes = ["dot", "cross", "ring"]
  return written(tmp_path_factory.mktemp("page")/"page.html", DIGITS, dict(classes=classes), num_classes=3, channels=4,
                 norm_groups=2, channel_mult=(1, 1))

def test_a_file_of_readable_size():
  for name, most in (("page.py", 120), ("page.template.html", 200)):
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

def test_any_name_and_a_schedule_of_ones_own(monkeypatch):
  """The script ends where the template ends it, and the description is not a list of numbers."""
  for part in ("answers", "network"): monkeypatch.setattr(page, part, lambda *_: {})
  names = ["</script>", "<!--<script>"]
  made = page.make(random_model(num_classes=2), DDPM(2, schedule=[0.1, 0.3]),
                   {"classes": names, "ddpm": {"schedule": [0.1, 0.3]}})
  data = json.loads(made.split("const M = ")[1].split("\n")[0])
  assert data["classes"] == names and "βₜ from 0.1 to 0.3." in data["about"]
  assert made.count("<script") == made.count("</script") == 1 and "<!--" not in made

# *** in a browser ***

@pytest.fixture(scope="module")
def send(tmp_path_factory):
  """A Chromium: a function that sends a command of the DevTools protocol; events holds what it said besides."""
  if not CHROMIUM: pytest.skip("Chromium is not installed")
  (to_browser, mine), (theirs, from_browser) = os.pipe(), os.pipe()
  def inherited():  # the protocol's two ends are descriptors 3 and 4
    for old, new in ((to_browser, 100), (from_browser, 101), (100, 3), (101, 4)): os.dup2(old, new)
  folder, quiet = tmp_path_factory.mktemp("browser"), subprocess.DEVNULL
  browser = subprocess.Popen([CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"], preexec_fn=inherited,
                             close_fds=False, stdout=quiet, stderr=quiet)
  for end in (to_browser, from_browser): os.close(end)
  numbers, answers, session = itertools.count(1), open(theirs, "rb"), {}
  def messages():
    text = b""
    while byte := answers.read1(65536):
      *whole, text = (text + byte).split(b"\0")
      yield from map(json.loads, whole)
  said = messages()
  def send(method, **params):
    os.write(mine, json.dumps(dict(id=(n := next(numbers)), method=method, params=params, **session)).encode() + b"\0")
    for message in said:
      if message.get("id") != n: send.events.append(message)
      elif "error" in message: raise RuntimeError(message["error"])
      else: return message["result"]
    raise RuntimeError("the browser is gone")
  send.events = []
  try:
    target = send("Target.createTarget", url="about:blank")["targetId"]
    session["sessionId"] = send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"): send(f"{domain}.enable")
    yield send
  finally:
    browser.kill()
    browser.wait()
    answers.close()
    os.close(mine)

def value(send, code):
  return send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)["result"].get("value")

def visit(send, url):
  """Opens the page, if it is another, and waits until its kernels are compiled."""
  if value(send, "location.href") == url: return
  send.events.clear()
  send("Page.navigate", url=url)
  until(send, f"{STATUS} && {STATUS} !== 'Compiling …'")
  if not value(send, "navigator.gpu?.requestAdapter().then(found => !!found)"):
    pytest.skip("this Chromium has no WebGPU in software")
  assert value(send, STATUS).startswith("Ready"), value(send, STATUS)

def until(send, code, seconds=120):
  """What the page's code is as soon as it is true."""
  ends = time.monotonic() + seconds
  while not (found := value(send, code)):
    assert time.monotonic() < ends, f"{code}: {problems(send)}"
    time.sleep(0.1)
  return found

STATUS = "document.getElementById('status')?.textContent"

def problems(send):
  """What is wrong by the console, and what was asked of other addresses."""
  asked = [e["params"]["request"]["url"] for e in send.events if e.get("method") == "Network.requestWillBeSent"]
  said = [e["params"] for e in send.events
          if e.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled")
          or e.get("method") == "Log.entryAdded" and e["params"]["entry"]["level"] == "error"]
  return said + [a for a in asked if a.split("#")[0] != asked[0].split("#")[0] and not a.startswith("data:")]

def compared(send, url):
  """What #test says. The page asks no other address, and no error is on its console."""
  visit(send, f"{url}#test")
  lines = until(send, "text = document.getElementById('test').textContent, text.split('\\n').length === 3 && text")
  assert not problems(send)
  return [*map(json.loads, lines.splitlines())]

def test_colours_v_and_no_clipping(tmp_path, send):
  ddpm = DDPM(T=30, beta_T=0.3, schedule="cosine", sigma="beta_tilde", predict="v")
  url = written(tmp_path/"page.html", ddpm, {"clip": False}, in_channels=3, image_size=(8, 4), channels=4,
                norm_groups=2, channel_mult=(1,), attn_resolutions=())
  found = compared(send, url)
  assert [m["w"] for m in found] == [1, 1] and max(m["difference"] for m in found) < 2e-3

def test_the_page_draws_what_python_draws(digits, send):
  found = compared(send, digits)
  assert [(m["sampler"], m["w"], m["steps"]) for m in found] == [("ddpm", 2, 10), ("ddim", 2, 10)]
  assert max(m["difference"] for m in found) < 2e-3

def pixels(send, part, row, x=0):
  """The levels of one image of 8 x 8 in a part of the page: of row 0, x_t, or of row 1, x̂_0."""
  code = f"document.querySelector('#{part} canvas').getContext('2d').getImageData({x}, {10 * row}, 8, 8)"
  return np.array(value(send, f"[...{code}.data]"))[::4]

def test_its_controls(digits, send):
  """The seed, the class and the slider; Eq. 4 on a drawing, and on from there; each line of Algorithm 2; no WebGPU."""
  visit(send, f"{digits}#test")
  def set_to(name, to, handler="onchange"):
    value(send, f"e = document.getElementById({name!r}), e.value = {to}, e.{handler}()")
  def press(name): value(send, f"document.getElementById({name!r}).click()")
  def drawn(part="drawn"):  # where a finished run arrived
    until(send, "document.querySelector('li:last-child').className === 'lit'")
    return value(send, f"document.querySelector('#{part} output').textContent")
  x_T = pixels(send, "drawn", 0)
  value(send, "seen = new Set, new MutationObserver(all => all.forEach(({ target: e }) => /lit/.test(e.className) && "
              "seen.add([...e.parentNode.children].indexOf(e) + 1))).observe(document.getElementById('lines'), "
              "{ subtree: true, attributeFilter: ['class'] })")
  press("draw")
  assert drawn().startswith("t = 0,") and value(send, "[...seen].sort().join()") == "1,3,4,6"
  x_0 = pixels(send, "drawn", 0)
  value(send, "e = document.querySelector('#drawn input'), e.value = 0, e.oninput()")
  assert (pixels(send, "drawn", 0) == x_T).all() and (x_0 != x_T).mean() > 0.9
  set_to("class", 1)
  press("draw")
  drawn()
  assert (pixels(send, "drawn", 0) != x_0).any()
  press("another")
  assert (pixels(send, "drawn", 0) != x_T).any()
  set_to("seed", 0)
  assert (pixels(send, "drawn", 0) == x_T).all()

  set_to("t", 17, "oninput")  # of ten steps of 40, it becomes 20
  spot = ("document.getElementById('pad').dispatchEvent(new PointerEvent('pointer{}', {{ buttons: 1, clientX: "
          "e.x + e.width * {}, clientY: e.y + e.height / 2 }}))")
  value(send, "document.getElementById('pad').setPointerCapture = () => {}, "  # there is no real pointer
              "e = document.getElementById('pad').getBoundingClientRect(), " + spot.format("down", 0.2) + "," +
              spot.format("move", 0.8))
  own, x_20 = pixels(send, "redrawn", 1), pixels(send, "redrawn", 0)
  assert own.max() > 60 and own[:16].max() == 0
  eps = f32(x_T.reshape(1, 1, 8, 8) / 127.5 - 1)  # within [-1, 1], where a level tells what the noise is
  known = DIGITS.q_sample(f32(own.reshape(1, 1, 8, 8) / 127.5 - 1), 20, eps).numpy().ravel()
  told = (x_T > 0) & (x_T < 255)
  assert told.sum() > 30
  close(x_20[told], np.clip((known[told] + 1) * 127.5, 0, 255), atol=2)
  press("denoise")
  assert drawn("redrawn").startswith("t = 0,") and (pixels(send, "drawn", 0) == x_T).all()
  assert value(send, "document.querySelector('#redrawn input').max") == "5"
  press("clear")
  assert pixels(send, "redrawn", 1).max() == 0

  press("draw")
  value(send, "document.getElementById('pause').checked = true")
  time.sleep(1)
  held = value(send, "document.querySelector('#drawn input').max")
  time.sleep(0.5)
  assert value(send, "document.querySelector('#drawn input').max") == held and int(held) < 10
  press("pause")
  assert drawn().startswith("t = 0,")
  assert not problems(send)
  send("Page.addScriptToEvaluateOnNewDocument",
       source="Object.defineProperty(navigator, 'gpu', { value: undefined })")
  send("Page.reload")
  assert "Chrome" in until(send, f"{STATUS}.includes('WebGPU') && {STATUS}")
