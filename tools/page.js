// Algorithm 2 of DDPM (arXiv:2006.11239) in a browser: the script of tools/page.html, for a model of tools/page.py.
const M = JSON.parse(document.getElementById("model").textContent), [C, H, W] = M.shape, N = 8, D = C * H * W
const $ = id => document.getElementById(id), say = text => $("status").textContent = text
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0)), frame = () => new Promise(requestAnimationFrame)
const each = f => Float32Array.from({ length: N * D }, (_, i) => f(i))  // a batch of images, (N, C, H, W)

// *** Algorithm 2. A chain has the tables of ddpm.py: a = √ᾱₜ, b = √(1−ᾱₜ), sigma = σₜ and those of Eq. 7 ***
const clip = v => M.clip ? Math.min(1, Math.max(-1, v)) : v
const estimate = { eps: (x, eps, a, b) => (x - b * eps) / a, x0: (x, x0) => x0, v: (x, v, a, b) => a * x - b * v }[M.predict]

async function* sample(chain, x_t, t, noise, y, w, light = () => {}) {  // 1: x_T ~ N(0, I) is given
  const { a, b, mu_x0, mu_xt, sigma } = chain
  for (; t >= 1; t--) {                                         // 2: for t = T, ..., 1 do
    await light(3)
    const z = chain.sampler === "ddpm" ? noise() : null         // 3: z ~ N(0, I) if t > 1, else z = 0
    await light(4)
    const out = await guided(x_t, chain.times[t], y, w)
    const x_0 = each(i => clip(estimate(x_t[i], out[i], a[t], b[t])))                   // Eq. 15
    if (z) x_t = each(i => mu_x0[t] * x_0[i] + mu_xt[t] * x_t[i] + (t > 1 && sigma[t] * z[i]))  // 4: Eq. 7 with x̂_0
    else x_t = each(i => a[t - 1] * x_0[i] + b[t - 1] * (x_t[i] - a[t] * x_0[i]) / b[t])   // DDIM, Eq. 12
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
  if (!adapter) throw Error("This browser has no WebGPU. Chrome and Edge have it from version 113 (Android: 121), Safari " +
    "from 26, Firefox from 141 on Windows and 145 on macOS; on Linux, chrome://flags/#enable-unsafe-webgpu may switch it on.")
  const { maxBufferSize, maxStorageBufferBindingSize, maxStorageBuffersPerShaderStage } = adapter.limits
  const gpu = await adapter.requestDevice({ requiredLimits: { maxBufferSize, maxStorageBufferBindingSize,
    maxStorageBuffersPerShaderStage } })
  gpu.onuncapturederror = e => say(e.error.message)
  gpu.lost.then(e => say(`The GPU is gone: ${e.message}`))
  const { STORAGE, UNIFORM, COPY_SRC, COPY_DST, MAP_READ } = GPUBufferUsage, [outAt, outSize] = M.out
  const memory = gpu.createBuffer({ size: M.memory, usage: STORAGE | COPY_SRC | COPY_DST })
  const answer = gpu.createBuffer({ size: outSize, usage: MAP_READ | COPY_DST })
  const infinity = gpu.createBuffer({ size: 4, usage: UNIFORM | COPY_DST })
  const [frequencies, ...inputs] = M.places, write = (at, values) => gpu.queue.writeBuffer(memory, at, values)
  const float = h => (h >> 15 ? -1 : 1) * (h >> 10 & 31 ? 2 ** ((h >> 10 & 31) - 25) * (1024 + (h & 1023)) : (h & 1023) / 2 ** 24)
  write(0, Float32Array.from(new Uint16Array(bytes(M.weights).buffer), float))
  write(frequencies, Float32Array.from(M.frequencies))
  gpu.queue.writeBuffer(infinity, 0, Float32Array.of(Infinity))
  let ready = 0
  const start = performance.now(), uses = []
  for (const [kernel, , parts] of M.plan) uses[kernel] = parts.length
  const pipelines = await Promise.all(M.kernels.map(async (code, k) => {
    const entries = [...Array(uses[k] + 1).keys()].map(binding => ({ binding, visibility: GPUShaderStage.COMPUTE,
      buffer: { type: binding ? "storage" : "uniform" } }))
    const layout = gpu.createPipelineLayout({ bindGroupLayouts: [gpu.createBindGroupLayout({ entries })] })
    const compute = { module: gpu.createShaderModule({ code }), entryPoint: /fn (\w+)\(@builtin/.exec(code)[1] }
    const made = await gpu.createComputePipelineAsync({ layout, compute })
    say(`Compiling: ${++ready} of ${M.kernels.length} kernels`)
    return made
  }))
  const plan = M.plan.map(([k, size, parts]) => [pipelines[k], gpu.createBindGroup({ layout: pipelines[k].getBindGroupLayout(0),
    entries: [{ binding: 0, resource: { buffer: infinity } }, ...parts.map(([offset, size], i) => (
      { binding: i + 1, resource: { buffer: memory, offset, size } }))] }), size])
  M.compiled = (performance.now() - start) / 1e3
  say(`Ready: ${M.kernels.length} kernels, compiled in ${M.compiled.toFixed(1)} s.`)
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
const R = 3.6541528853610088, AREA = 0.004928673233974658, bell = x => Math.exp(-x * x / 2), edge = [0], round = Math.fround
edge[255] = R
for (let i = 254; i > 0; i--) edge[i] = Math.sqrt(-2 * Math.log(AREA / edge[i + 1] + bell(edge[i + 1])))
const heights = edge.map(x => round(bell(x))), widths = edge.map((x, i) => round((i ? x : AREA / bell(R)) / 2 ** 23))
const inside = edge.map((x, i) => Math.round((i ? edge[i - 1] / x : R * bell(R) / AREA) * 2 ** 23))

function stream(seed, use, image) {  // engine/streams.py: a generator of N(0, 1), float32
  let c = 0x43b0d7e5
  const hash = (v, by) => { v ^= c; c = Math.imul(c, by); v = Math.imul(v, c); return v ^ v >>> 16 }
  const pool = [seed, 0x5a, use, image].map(v => hash(v, 0x931e8875))
  for (let from = 0; from < 4; from++) for (let to = 0; to < 4; to++) if (from !== to) {
    const v = Math.imul(0xca01f9dd, pool[to]) - Math.imul(0x4973f715, hash(pool[from], 0x931e8875))
    pool[to] = v ^ v >>> 16
  }
  c = 0x8b51f9dd
  const words = [...Array(8).keys()].map(i => BigInt(hash(pool[i % 4], 0x58f38ded) >>> 0))
  const [first, odd] = [0, 4].map(i => words[i + 1] << 96n | words[i] << 64n | words[i + 3] << 32n | words[i + 2])
  const step = () => state = BigInt.asUintN(128, state * 0x2360ed051fc65da44385df649fccf645n + (odd << 1n | 1n))
  let state = 0n, spare = -1
  step(); state += first; step()
  const next = () => {  // 32 bits
    if (spare >= 0) { const v = spare; spare = -1; return v }
    const v = BigInt.asUintN(64, step() >> 64n ^ state), turn = state >> 122n
    const out = BigInt.asUintN(64, v >> turn | v << 64n - turn)
    spare = Number(out >> 32n)
    return Number(out & 0xffffffffn)
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
const normals = (seed, use) => { const own = [...Array(N).keys()].map(i => stream(seed, use, i))
  return () => each(i => own[i / D | 0]()) }

// *** what one sees: eight images of two rows, x_t and x̂_0, and a slider over the steps that were drawn ***
const levels = x => Uint8ClampedArray.from(x, v => (v + 1) * 127.5)
function paint(canvas, batch, i) {
  const picture = new ImageData(W, H)
  if (batch) for (let p = 0; p < H * W; p++) for (let c = 0; c < 4; c++)
    picture.data[4 * p + c] = c === 3 ? 255 : batch[i * D + (C === 3 ? c : 0) * H * W + p]
  canvas.getContext("2d").putImageData(picture, 0, 0)
}
function view(root) {
  root.innerHTML = `<div class="images">${"<div><canvas></canvas><canvas></canvas></div>".repeat(N)}</div><input type="range"
    class="walk" min="0" max="0" value="0" aria-label="Back and forth over the steps drawn"><output></output>`
  const canvases = [...root.querySelectorAll("canvas")], [walk, where] = root.querySelectorAll("input, output"), steps = []
  canvases.forEach((canvas, i) => Object.assign(canvas, { width: W, height: H, role: "img",
    ariaLabel: `image ${(i >> 1) + 1}: ${i % 2 ? "what the network expects" : "so far"}` }))
  walk.oninput = () => {
    const { t, a, x_t, x_0 } = steps[walk.value], ᾱ = a * a
    canvases.forEach((canvas, i) => paint(canvas, i % 2 ? x_0 : x_t, i >> 1))
    where.textContent = walk.ariaValueText = `t = ${t}    ᾱₜ = ${ᾱ.toPrecision(3)}    noise √(1−ᾱₜ) = ${
      Math.sqrt(1 - ᾱ).toFixed(3)}`
  }
  return { first: canvases[0], clear: () => steps.length = 0, add(t, a, x_t, x_0) {
    const follows = walk.value === walk.max || !steps.length
    steps.push({ t, a, x_t: levels(x_t), x_0: x_0 && levels(x_0) })
    walk.max = steps.length - 1
    if (follows) { walk.value = walk.max; walk.oninput() }
  } }
}
const drawn = view($("drawn")), redrawn = view($("redrawn")), K = M.classes.length
const chosen = () => M.chains[$("chain").value], seed = () => +$("seed").value
const labels = k => [...Array(N).keys()].map(i => k === "" && K ? Math.floor(i / Math.ceil(N / K)) : +k)
const lit = line => document.querySelectorAll("li").forEach((li, i) => li.classList.toggle("lit", i + 1 === line))

let network, run = 0, going = false, paused = false, once = false, last = Promise.resolve()
function halt(now) { paused = now; $("pause").textContent = now ? "Go on" : "Pause" }
function begin(where, x_t, t) {  // a run ends at its next step where another begins
  const mine = ++run
  halt(false)
  last = last.then(() => draw(() => mine === run, where, x_t, t)).catch(e => say(e.message))
}
async function draw(on, where, x_t, from) {
  const chain = chosen(), noise = normals(seed(), 2), start = performance.now()
  const light = line => { lit(line); return frame() }
  let waited = 0
  going = true
  $("pause").disabled = false
  await light(1)
  for await (const [t, x, x_0] of sample(chain, x_t, from, noise, labels($("class").value), +$("w").value, light)) {
    if (!on()) return
    where.add(chain.times[t], chain.a[t], x, x_0)
    const since = performance.now()
    say(`Step ${from - t} of ${from}, ${Math.round((since - start - waited) / (from - t))} ms each`)
    while (paused && !once && t && on()) await frame()
    waited += performance.now() - since
    once = false
  }
  going = false
  $("pause").disabled = true
  lit(6)
}

// *** the second part: x_0 is a drawing ***
const pad = Object.assign($("pad"), { width: 10 * W, height: 10 * H }), pen = pad.getContext("2d")
const small = Object.assign(document.createElement("canvas"), { width: W, height: H }).getContext("2d")
function start() {  // x_T, the noise of the seed
  run++
  const x_T = normals(seed(), 1)(), { a, steps, times } = chosen()
  drawn.clear(); drawn.add(times[steps], a[steps], x_T)
  $("python").textContent = `python sample.py --checkpoint … --seed ${seed()} --steps ${steps}` +
    (chosen().sampler === "ddim" ? " --sampler ddim" : "") + (+$("w").value !== 1 ? ` --guidance ${$("w").value}` : "") +
    (K && $("class").value === "" ? ` --classes --n ${Math.ceil(N / K)}` : " --n 8") +
    ($("class").value ? ` --class ${M.classes[$("class").value]}` : "")
  document.querySelectorAll(".ddpm, .ddim").forEach(e => e.hidden = !e.classList.contains(chosen().sampler))
  noised()
  return [drawn, x_T, steps]
}
function noised() {  // Eq. 4: x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε
  run++
  const { a, b, times } = chosen(), eps = normals(seed(), 1)()
  const t = times.findIndex(time => time >= $("t").value)
  small.imageSmoothingQuality = "high"
  small.drawImage(pad, 0, 0, W, H)
  const { data } = small.getImageData(0, 0, W, H)
  const x_0 = each(i => data[i % (H * W) * 4 + Math.floor(i % D / (H * W))] / 127.5 - 1)
  const x_t = each(i => a[t] * x_0[i] + b[t] * eps[i])
  redrawn.clear(); redrawn.add(times[t], a[t], x_t, x_0)
  $("t_is").textContent = times[t]
  return [redrawn, x_t, t]
}
function wipe() { pen.fillStyle = "#000"; pen.fillRect(0, 0, pad.width, pad.height); noised() }
pad.onpointerdown = pad.onpointermove = e => {
  if (!e.buttons) return
  const x = e.offsetX * pad.width / pad.clientWidth, y = e.offsetY * pad.height / pad.clientHeight
  if (e.type === "pointerdown") { pad.setPointerCapture(e.pointerId); pen.beginPath(); pen.moveTo(x, y) }
  Object.assign(pen, { lineWidth: pad.width * 0.08, lineCap: "round", lineJoin: "round", strokeStyle: $("colour").value })
  pen.lineTo(x, y)
  pen.stroke()
}
pad.onpointerup = noised

// *** the controls ***
const option = (text, value) => new Option(text, value)
const names = { [M.T]: "Algorithm 2" }
M.chains.forEach((c, i) => $("chain").add(option(`${c.steps.toLocaleString("en")}${c.sampler === "ddim" ? " by DDIM" : ""}`, i)))
$("chain").value = Math.min(1, M.chains.length - 1)
$("class").add(option("one of each", ""))
M.classes.forEach((name, k) => $("class").add(option(name, k)))
document.querySelectorAll(".labels").forEach(e => e.hidden = !K || e.classList.contains("guidance") && !M.known)
$("ink").hidden = C === 1
Object.assign($("t"), { max: M.T, value: M.T * 0.4 })
for (const [name, value] of Object.entries(M.about)) {
  $("about").append(Object.assign(document.createElement("dt"), { textContent: name }))
  $("about").append(Object.assign(document.createElement("dd"), { textContent: value }))
}
$("licence").textContent = M.licence
$("draw").onclick = () => begin(...start())
$("pause").onclick = () => halt(!paused)
$("one").onclick = () => { if (!going) begin(...start()); halt(true); once = true }
$("another").onclick = () => { $("seed").value = seed() + 1; start() }
for (const id of ["seed", "chain", "class", "w"]) $(id).onchange = start
$("w").oninput = () => $("w_is").textContent = $("w").value
$("t").oninput = noised
$("clear").onclick = wipe
$("copy").onclick = () => { pen.drawImage(drawn.first, 0, 0, pad.width, pad.height); noised() }
$("denoise").onclick = () => begin(...noised())
$("w").oninput()
wipe()
start()

async function test() {  // the first images, beside Python's
  for (const known of M.tests) {
    const start = performance.now(), x_0 = new Float32Array(bytes(known.x_0).buffer)
    let x
    for await ([, x] of sample(known, normals(0, 1)(), known.steps, normals(0, 2), labels(""), known.w));
    known.difference = Math.max(...x_0.map((v, i) => Math.abs(v - x[i])))
    known.ms = (performance.now() - start) / known.steps
  }
  $("test").textContent = JSON.stringify(M.tests.map(({ sampler, w, steps, difference, ms }) => (
    { sampler, w, steps, difference, ms, compiled: M.compiled })))
}
try {
  network = await open()
  for (const id of ["draw", "one", "denoise"]) $(id).disabled = false
  if (location.hash === "#test") await test()
} catch (e) { say(e.message) }
