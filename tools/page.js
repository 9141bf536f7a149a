// Algorithm 2 of DDPM (arXiv:2006.11239) in a browser: the script of tools/page.html, for a model of tools/page.py.
const M = JSON.parse(document.getElementById("model").textContent), [C, H, W] = M.shape, N = 8, D = C * H * W
const $ = id => document.getElementById(id), say = text => $("status").textContent = text
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0)), numbers = n => [...Array(n).keys()]
const each = f => Float32Array.from({ length: N * D }, (_, i) => f(i))  // a batch of images, (N, C, H, W)

// *** Algorithm 2. A chain has the tables of ddpm.py: a = √ᾱₜ, b = √(1−ᾱₜ), sigma = σₜ and those of Eq. 7 ***
const clip = v => M.clip ? Math.min(1, Math.max(-1, v)) : v
const estimate = {                       // x̂_0 from what the network answers: Eq. 15 if it is ε
  eps: (x, eps, a, b) => (x - b * eps) / a, x0: (x, x0) => x0, v: (x, v, a, b) => a * x - b * v }[M.predict]

async function* sample(chain, x_t, t, noise, y, w, light = () => {}) {  // 1: x_T ~ N(0, I) is given
  const { a, b, mu_x0, mu_xt, sigma } = chain
  for (; t >= 1; t--) {                                         // 2: for t = T, ..., 1 do
    await light(3)
    const z = chain.sampler === "ddpm" ? noise() : null         // 3: z ~ N(0, I) if t > 1, else z = 0
    await light(4)
    const out = await guided(x_t, chain.times[t], y, w)
    const x_0 = each(i => clip(estimate(x_t[i], out[i], a[t], b[t])))
    // 4: xₜ₋₁ = 1/√αₜ (xₜ − βₜ/√(1−ᾱₜ) ε_θ) + σₜ z, by Eq. 7 with x̂_0, so that it may be clipped; or DDIM's Eq. 12
    x_t = z ? each(i => mu_x0[t] * x_0[i] + mu_xt[t] * x_t[i] + (t > 1 && sigma[t] * z[i]))
      : each(i => a[t - 1] * x_0[i] + b[t - 1] * (x_t[i] - a[t] * x_0[i]) / b[t])
    yield [t - 1, x_t, x_0]
  }                                                             // 5: end for
}

async function guided(x_t, t, y, w) {  // Ho & Salimans 2021, Eq. 6: ε(x, ∅) + w (ε(x, y) − ε(x, ∅))
  if (w === 1 || !M.known) return network(x_t, t, y)
  const free = await network(x_t, t, y.map(() => M.classes.length))
  if (w === 0) return free
  const labelled = await network(x_t, t, y)
  return each(i => free[i] + w * (labelled[i] - free[i]))
}

// *** the network: tinygrad's kernels, one after the other, in one memory ***
async function open() {
  const adapter = await navigator.gpu?.requestAdapter({ powerPreference: "high-performance" })
  if (!adapter) throw Error("The network needs WebGPU, which this browser does not have. Chrome and Edge have it " +
    "since version 113 (on Android 121), Safari since 26, Firefox since 141 on Windows and 145 on macOS. On Linux, " +
    "Chrome may have to be told so: chrome://flags/#enable-unsafe-webgpu")
  const { maxBufferSize, maxStorageBufferBindingSize, maxStorageBuffersPerShaderStage } = adapter.limits
  const requiredLimits = { maxBufferSize, maxStorageBufferBindingSize, maxStorageBuffersPerShaderStage }
  const gpu = await adapter.requestDevice({ requiredLimits })
  gpu.onuncapturederror = e => say(e.error.message)
  gpu.lost.then(e => say(`The GPU is gone: ${e.message}`))
  const { STORAGE, UNIFORM, COPY_SRC, COPY_DST, MAP_READ } = GPUBufferUsage, [outAt, outSize] = M.out
  const memory = gpu.createBuffer({ size: M.memory, usage: STORAGE | COPY_SRC | COPY_DST })
  const answer = gpu.createBuffer({ size: outSize, usage: MAP_READ | COPY_DST })
  const infinity = gpu.createBuffer({ size: 4, usage: UNIFORM | COPY_DST })  // WGSL has no such constant
  const scale = h => 2 ** (Math.max(1, h >> 10 & 31) - 25), whole = h => h % 1024 + (h >> 10 & 31 ? 1024 : 0)
  const float = h => (h >> 15 ? -1 : 1) * scale(h) * whole(h)  // of 16 bits
  const [frequencies, ...inputs] = M.places, write = (at, values) => gpu.queue.writeBuffer(memory, at, values)
  write(0, Float32Array.from(new Uint16Array(bytes(M.weights).buffer), float))
  write(frequencies, Float32Array.from(M.frequencies))
  gpu.queue.writeBuffer(infinity, 0, Float32Array.of(Infinity))

  const began = performance.now(), uses = []
  for (const [kernel, , parts] of M.plan) uses[kernel] = parts.length
  const sine = `fn sine(x: f32) -> f32 {  // of any angle: WGSL promises nothing of sin beyond −π..π
    let k = round(x / 6.2831853); return sin(x - k * 6.28125 - k * 0.0019353072); }\n`
  let ready = 0
  const pipelines = await Promise.all(M.kernels.map(async (code, k) => {
    const entries = numbers(uses[k] + 1).map(binding => ({ binding, visibility: GPUShaderStage.COMPUTE,
      buffer: { type: binding ? "storage" : "uniform" } }))
    const layout = gpu.createPipelineLayout({ bindGroupLayouts: [gpu.createBindGroupLayout({ entries })] })
    const module = gpu.createShaderModule({ code: sine + code.replaceAll(" sin(", " sine(") })
    const compute = { module, entryPoint: /fn (\w+)\(@builtin/.exec(code)[1] }
    const made = await gpu.createComputePipelineAsync({ layout, compute })
    say(`Compiling: ${++ready} of ${M.kernels.length} kernels`)
    return made
  }))
  const plan = M.plan.map(([kernel, size, parts]) => {
    const resources = [{ buffer: infinity }, ...parts.map(([offset, size]) => ({ buffer: memory, offset, size }))]
    const entries = resources.map((resource, binding) => ({ binding, resource })), pipeline = pipelines[kernel]
    return [pipeline, gpu.createBindGroup({ layout: pipeline.getBindGroupLayout(0), entries }), size]
  })
  M.compiled = (performance.now() - began) / 1e3
  M.adapter = `${adapter.info?.vendor ?? ""} ${adapter.info?.architecture ?? ""}`.trim()
  say(`Ready: ${M.kernels.length} kernels, compiled in ${M.compiled.toFixed(1)} s` + (M.adapter && ` for ${M.adapter}`))
  return async (x_t, t, y) => {  // what the network answers
    [x_t, new Int32Array(N).fill(t), Int32Array.from(y)].forEach((values, i) => write(inputs[i], values))
    const encoder = gpu.createCommandEncoder(), pass = encoder.beginComputePass()
    for (const [pipeline, group, size] of plan) {
      pass.setPipeline(pipeline); pass.setBindGroup(0, group); pass.dispatchWorkgroups(...size)
    }
    pass.end()
    encoder.copyBufferToBuffer(memory, outAt, answer, 0, outSize)
    gpu.queue.submit([encoder.finish()])
    await answer.mapAsync(GPUMapMode.READ)
    const out = new Float32Array(answer.getMappedRange().slice(0))
    answer.unmap()
    return out
  }
}

// *** numpy's random numbers, so that a seed draws what it draws in Python: SeedSequence, PCG64, a ziggurat ***
const R = 3.6541528853610088, AREA = 0.004928673233974658, bell = x => Math.exp(-x * x / 2), round = Math.fround
const edge = Object.assign([0], { 255: R })
for (let i = 254; i > 0; i--) edge[i] = Math.sqrt(-2 * Math.log(AREA / edge[i + 1] + bell(edge[i + 1])))
const heights = edge.map(x => round(bell(x))), widths = edge.map((x, i) => round((i ? x : AREA / bell(R)) / 2 ** 23))
const inside = edge.map((x, i) => Math.round((i ? edge[i - 1] / x : R * bell(R) / AREA) * 2 ** 23))

function stream(seed, use, image) {  // engine/streams.py: a generator of N(0, 1) in float32; use: 1 for x_T, 2 for z
  let c = 0x43b0d7e5, state = 0n, spare = null
  const hash = (v, by) => { v ^= c; c = Math.imul(c, by); v = Math.imul(v, c); return v ^ v >>> 16 }
  const pool = [seed, 0x5a, use, image].map(v => hash(v, 0x931e8875))
  for (let from = 0; from < 4; from++) for (let to = 0; to < 4; to++) if (from !== to) {
    const v = Math.imul(0xca01f9dd, pool[to]) - Math.imul(0x4973f715, hash(pool[from], 0x931e8875))
    pool[to] = v ^ v >>> 16
  }
  c = 0x8b51f9dd
  const words = [0, 1, 2, 3, 0, 1, 2, 3].map(i => BigInt(hash(pool[i], 0x58f38ded) >>> 0))
  const [first, odd] = [0, 4].map(i => words[i + 1] << 96n | words[i] << 64n | words[i + 3] << 32n | words[i + 2])
  const step = () => state = BigInt.asUintN(128, state * 0x2360ed051fc65da44385df649fccf645n + (odd << 1n | 1n))
  step(); state += first; step()
  const next = () => {  // 32 bits, the lower half of a number first
    if (spare !== null) { const v = spare; spare = null; return v }
    const v = BigInt.asUintN(64, step() >> 64n ^ state), turn = state >> 122n, out = v >> turn | v << 64n - turn
    spare = Number(BigInt.asUintN(32, out >> 32n))
    return Number(BigInt.asUintN(32, out))
  }
  const uniform = () => (next() >>> 8) / 2 ** 24
  return () => {
    for (;;) {
      const r = next(), i = r & 255, m = r >>> 9, sign = r & 256 ? -1 : 1, x = round(m * widths[i])
      if (m < inside[i]) return sign * x
      if (i && round(round(heights[i - 1] - heights[i]) * uniform() + heights[i]) < bell(x)) return sign * x
      while (!i) {  // the tail
        const far = round(-Math.log1p(-uniform()) / R), y = -Math.log1p(-uniform())
        if (y + y > far * far) return (m & 256 ? -1 : 1) * round(R + far)
      }
    }
  }
}
const normals = (seed, use) => {  // the next noise of each image
  const own = numbers(N).map(image => stream(seed, use, image))
  return () => each(i => own[Math.floor(i / D)]())
}

// *** what one sees: eight images in two rows, x_t and x̂_0, and a slider over the steps that were drawn ***
const levels = x => Uint8ClampedArray.from(x, v => (v + 1) * 127.5)
function paint(canvas, batch, i) {
  const picture = new ImageData(W, H)
  if (batch) picture.data.forEach((_, p, data) => data[p] = p % 4 === 3 ? 255 :
    batch[i * D + (C === 3 ? p % 4 : 0) * H * W + (p >> 2)])
  canvas.getContext("2d").putImageData(picture, 0, 0)
}
function view(root) {
  root.innerHTML = `<div class="images">${"<div><canvas></canvas><canvas></canvas></div>".repeat(N)}</div>
    <input type="range" class="walk" value="0" max="0" aria-label="Back and forth over the steps"><output></output>`
  const canvases = root.querySelectorAll("canvas"), [walk, where] = root.querySelectorAll("input, output"), steps = []
  canvases.forEach((canvas, i) => Object.assign(canvas, { width: W, height: H, role: "img",
    ariaLabel: `image ${(i >> 1) + 1}, ${i % 2 ? "as the network expects it" : "so far"}` }))
  walk.oninput = () => {
    const { t, a, b, x_t, x_0 } = steps[walk.value]
    canvases.forEach((canvas, i) => paint(canvas, i % 2 ? x_0 : x_t, i >> 1))
    where.textContent = `t = ${t}     ᾱₜ = ${+(a * a).toPrecision(3)}     noise √(1−ᾱₜ) = ${b.toFixed(3)}`
    walk.ariaValueText = `t = ${t}`
  }
  return { first: canvases[0], clear: () => steps.length = 0, add(chain, t, x_t, x_0) {
    const follows = walk.value === walk.max || !steps.length
    steps.push({ t: chain.times[t], a: chain.a[t], b: chain.b[t], x_t: levels(x_t), x_0: x_0 && levels(x_0) })
    walk.max = steps.length - 1
    if (follows) { walk.value = walk.max; walk.oninput() }
  } }
}
const drawn = view($("drawn")), redrawn = view($("redrawn")), K = M.classes.length
const value = id => +$(id).value, chosen = () => M.chains[value("chain")]
const labels = k => numbers(N).map(i => k === "" && K ? Math.floor(i / Math.ceil(N / K)) : +k)

// *** a run: it ends where another begins, or where a setting changes ***
const frame = () => new Promise(requestAnimationFrame)
let network, run = 0, running = null, paused = false, once = false, last = Promise.resolve()
const lit = line => document.querySelectorAll("li").forEach((li, i) => li.classList.toggle("lit", i + 1 === line))
function halt(now) { paused = now; $("pause").textContent = now ? "Go on" : "Pause" }
function stop(line) { run++; running = null; $("pause").disabled = true; halt(false); lit(line) }
function begin(where, x_t, t) {
  stop()
  const mine = run
  running = where
  $("pause").disabled = false
  last = last.then(() => draw(() => mine === run, where, x_t, t)).catch(e => say(e.message))
}
async function draw(on, where, x_t, from) {
  const chain = chosen(), noise = normals(value("seed"), 2)
  let shown = 0, spent = 0, since = performance.now()
  const light = async line => { lit(line); if (performance.now() - shown > 30) shown = await frame() }
  await light(1)
  for await (const [t, x, x_0] of sample(chain, x_t, from, noise, labels($("class").value), value("w"), light)) {
    if (!on()) return
    where.add(chain, t, x, x_0)
    spent += performance.now() - since
    say(`Step ${from - t} of ${from}, ${Math.round(spent / (from - t))} ms each`)
    while (paused && !once && t && on()) await frame()
    once = false
    since = performance.now()
  }
  if (on()) stop(6)
}
function start() {  // Algorithm 2, line 1: x_T, the noise of the seed
  stop()
  const x_T = normals(value("seed"), 1)(), { steps, sampler } = chosen(), k = $("class").value
  drawn.clear()
  drawn.add(chosen(), steps, x_T)
  document.querySelectorAll(".ddpm, .ddim").forEach(e => e.hidden = !e.classList.contains(sampler))
  $("python").textContent = `python sample.py --checkpoint … --seed ${value("seed")} --steps ${steps}` +
    (sampler === "ddim" ? " --sampler ddim" : "") + (M.known && value("w") !== 1 ? ` --guidance ${value("w")}` : "") +
    (K && k === "" ? ` --classes --n ${Math.ceil(N / K)}` : " --n 8") + (k === "" ? "" : ` --class ${M.classes[k]}`)
  noised()
  return [drawn, x_T, steps]
}

// *** the second part: x_0 is a drawing ***
const pad = Object.assign($("pad"), { width: 10 * W, height: 10 * H }), pen = pad.getContext("2d")
Object.assign(pen, { lineWidth: pad.width * 0.08, lineCap: "round", lineJoin: "round" })
const small = Object.assign(document.createElement("canvas"), { width: W, height: H })
  .getContext("2d", { willReadFrequently: true })
function noised() {  // Eq. 4: x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε
  if (running === redrawn) stop()
  small.imageSmoothingQuality = "high"
  small.drawImage(pad, 0, 0, W, H)
  const { data } = small.getImageData(0, 0, W, H), { a, b, times } = chosen(), eps = normals(value("seed"), 1)()
  const t = times.findIndex(time => time >= value("t"))  // of the chain's times
  const x_0 = each(i => data[i % (H * W) * 4 + Math.floor(i % D / (H * W))] / 127.5 - 1)
  const x_t = each(i => a[t] * x_0[i] + b[t] * eps[i])
  redrawn.clear()
  redrawn.add(chosen(), t, x_t, x_0)
  $("t_is").textContent = times[t]
  return [redrawn, x_t, t]
}
const drawing = (name = "") => pad.parentNode.className = name
function wipe() { pen.fillStyle = "#000"; pen.fillRect(0, 0, pad.width, pad.height); drawing("empty") }
pad.onpointerdown = pad.onpointermove = e => {
  if (!e.buttons) return
  drawing()
  const x = e.offsetX * pad.width / pad.clientWidth, y = e.offsetY * pad.height / pad.clientHeight
  if (e.type === "pointerdown") { pad.setPointerCapture(e.pointerId); pen.beginPath(); pen.moveTo(x, y) }
  pen.strokeStyle = $("colour").value
  pen.lineTo(x, y)
  pen.stroke()
}
pad.onpointerup = $("t").oninput = noised

// *** the controls ***
M.chains.forEach((c, i) => $("chain").add(new Option(
  `${c.steps === M.T ? "all " : ""}${c.steps}${c.sampler === "ddim" ? ", DDIM" : ""}`, i)))
$("chain").value = Math.min(1, M.chains.length - 1)
$("class").add(new Option("one of each", ""))
M.classes.forEach((name, k) => $("class").add(new Option(name, k)))
document.querySelectorAll(".labels").forEach(e => e.hidden = !K || e.classList.contains("guidance") && !M.known)
$("ink").hidden = C === 1
Object.assign($("t"), { max: M.T, value: M.T * 0.4 })
for (const pair of Object.entries(M.about)) pair.forEach((textContent, i) => $("about").append(
  Object.assign(document.createElement(i ? "dd" : "dt"), { textContent })))
$("licence").textContent = M.licence
$("draw").onclick = () => begin(...start())
$("pause").onclick = () => halt(!paused)
$("one").onclick = () => { if (running) once = true; else begin(...start()); halt(true) }
$("another").onclick = () => { $("seed").value = value("seed") + 1; start() }
for (const id of ["seed", "chain", "class", "w"]) $(id).onchange = start
$("w").oninput = () => $("w_is").textContent = value("w")
$("clear").onclick = () => { wipe(); noised() }
$("copy").onclick = () => { pen.drawImage(drawn.first, 0, 0, pad.width, pad.height); drawing(); noised() }
$("denoise").onclick = () => begin(...noised())
$("w").oninput(); wipe(); start()

async function test() {  // with #test behind the address: the first images beside Python's
  const made = []
  for (const known of M.tests) {
    const began = performance.now(), x_0 = new Float32Array(bytes(known.x_0).buffer)
    let x
    for await ([, x] of sample(known, normals(0, 1)(), known.steps, normals(0, 2), labels(""), known.w));
    const { sampler, w, steps } = known, difference = Math.max(...x_0.map((v, i) => Math.abs(v - x[i])))
    made.push({ sampler, w, steps, difference, ms: (performance.now() - began) / steps })
  }
  $("test").textContent = JSON.stringify({ compiled: M.compiled, adapter: M.adapter, made })
}
try {
  network = await open()
  for (const id of ["draw", "one", "denoise"]) $(id).disabled = false
  if (location.hash === "#test") await test()
} catch (e) { say(e.message) }
