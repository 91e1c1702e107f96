// Runs a job: job.json and inputs.safetensors in, findings.json and outputs.safetensors out.

package io.pruneport.core

import java.io.File
import java.time.Instant
import java.time.temporal.ChronoUnit

/** The phone, or whatever runs a job, as its system tells. */
interface DeviceState {
    val info: DeviceInfo

    fun condition(): Condition

    /** True where the system itself says that heat slows it down; it may have no thermometer that says how hot. */
    val isThrottled: Boolean

    /** Bytes of this process: the highest so far, and now. */
    val peakBytes: Long
    val bytes: Long

    /** Bytes that this process may still take; 0 where the system does not tell. */
    val availableBytes: Long
}

/**
 * Where a job lies: the folder of job.json and inputs.safetensors, that of its bundle, and that of its twin.
 *
 * The bundles may lie elsewhere: Android lets no app follow a link that the shell made.
 */
class Place(val job: File, val bundle: File = File(job, "bundle"), val twin: File = File(job, "twin"))

/**
 * One walk over the job in a [place].
 *
 * [app] and [version] name the program; [say] hears one line a stage. Throws Trouble for what is no job.
 */
class JobRun(
    private val place: Place,
    private val device: DeviceState,
    private val engines: List<Engine>,
    app: String,
    version: String,
    private val say: (String) -> Unit = {},
) {
    private val job = JobFile.read(place.job)
    private val start = System.nanoTime()
    private val findings: Findings
    private val outputs = LinkedHashMap<String, Tensor>()
    private var inputs: Map<String, Tensor> = emptyMap()
    private var manifest: Manifest? = null
    private var photo: Photo? = null
    private var photoMs = 0.0
    private var waitedS = 0.0

    init {
        // Of a bundle whose graphs go to several engines, the one that has the vision graph is named.
        val wanted =
            try {
                Manifest.read(place.bundle, Choice.Vision(job.vision)).graph(GraphName.VISION)?.engine
            } catch (_: Trouble) {
                null
            }
        val engine = engines.firstOrNull { it.name == wanted } ?: engines.firstOrNull()
        findings =
            Findings(
                job = job.id,
                bundle = job.bundle,
                twin = job.twin?.bundle,
                device = device.info,
                runner =
                    RunnerInfo(
                        app, version, engine?.name ?: wanted ?: "none", engine?.version ?: "none", engine?.commit ?: "",
                    ),
                threads = (engine?.threads(job.threads) ?: 1).coerceIn(1, 1024),
                startedUtc = now(),
                endedUtc = now(),
            )
    }

    /** Runs everything and writes the findings into a folder. Throws Trouble where not even they can be written. */
    fun run(out: File): Findings {
        look()
        findings.trouble =
            troubleOf {
                inputs = Safetensors.read(File(place.job, JobFile.INPUTS))
                openBundle().use { graphs ->
                    probe()
                    takePhoto(graphs.manifest.image)
                    for (step in job.steps) findings.steps += run(step, graphs)
                    job.answer?.let { findings.answer = answer(it, graphs) }
                }
            }
        look()
        val peak = device.peakBytes
        giveBack()
        findings.memory = MemoryFound(peak, device.bytes)
        findings.endedUtc = now()
        val minibench = manifest?.let { Minibench.entries(findings, it, device.availableBytes) }
        findings.write(outputs, minibench ?: Json.Items(emptyList()), out)
        return findings
    }

    /** What lies outside of Java's heap is freed when it collects what held that, and a little later. */
    private fun giveBack() {
        inputs = emptyMap()
        photo = null
        repeat(3) {
            System.gc()
            Thread.sleep(100)
        }
    }

    /** Engines are other people's code: whatever they throw is written down, memory that ran out included. */
    private fun troubleOf(block: () -> Unit): TroubleFound? =
        try {
            block()
            null
        } catch (error: Exception) {
            TroubleFound.of(error)
        } catch (error: OutOfMemoryError) {
            TroubleFound.of(error)
        } catch (error: LinkageError) {
            TroubleFound.of(error)
        }

    private fun look() {
        findings.conditions += device.condition().copy(atMs = millisecondsSince(start))
    }

    /** Opens the graphs: twice where this is the first start, if that prepares files for the later ones. */
    private fun openBundle(): Graphs {
        val folder = place.bundle
        val manifest = Manifest.read(folder, Choice.Vision(job.vision))
        this.manifest = manifest
        val prepared = manifest.graphs.map { engineFor(it, engines).preparation(it, folder) }
        say("opening the graphs")
        val first = ArrayList<Double>()
        if (Preparation.MISSING in prepared) {
            val start = System.nanoTime()
            Graphs.open(manifest, folder, engines).close()
            first += millisecondsSince(start)
        }
        val start = System.nanoTime()
        val graphs = Graphs.open(manifest, folder, engines)
        val spent = listOf(millisecondsSince(start))
        val alike = prepared.all { it == Preparation.NONE }
        findings.load = if (alike) LoadFound(firstMs = spent) else LoadFound(first, spent)
        return graphs
    }

    private fun input(name: String): Tensor = inputs[name] ?: throw Trouble("${JobFile.INPUTS} has no $name")

    /** In how many bits float16 products are added up here: ones are lost beside 2048 where sums are float16. */
    private fun probe() {
        val file = File(place.job, "accumulator.pte")
        val engine = engines.firstOrNull { it.name == "executorch" }
        if (!file.exists() || engine == null) return
        val (rows, depth, columns) = Triple(8, 256, 16)
        val graph =
            GraphInfo(
                name = "forward",
                file = file.name,
                engine = engine.name,
                inputs = listOf(TensorInfo("row", DType.FLOAT16, listOf(1, rows, depth))),
                outputs = listOf(TensorInfo("sums", DType.FLOAT16, listOf(1, rows, columns))),
            )
        val row = Tensor(DType.FLOAT16, listOf(1, rows, depth))
        for (i in 0 until rows * depth) row.bytes.putShort(i * 2, if (i % depth == 0) TWO_THOUSAND_48 else ONE)
        val sums = engine.open(graph, place.job).use { it.run(mapOf("row" to row)).getValue("sums").floats() }
        // 2048 + 255 rounds to 2304 in float16; 2302 is the number before it.
        findings.accumulatorBits = if (sums.all { it >= 2302 }) 32 else 16
    }

    private fun run(step: StepJob, graphs: Graphs): StepFound {
        val found = StepFound(step.graph, step.step)
        found.trouble =
            troubleOf {
                say("running ${if (step.graph == step.step) step.graph else "${step.graph} at ${step.step}"}")
                val runner = graphs[step.graph]
                val key = "${step.graph}/${step.step}"
                val given = runner.info.inputs.associate { it.name to input("in/$key/${it.name}") }
                val made = graphs.run(step.graph, given)
                // Copied: the engine may write there again.
                for ((name, tensor) in made) outputs["out/$key/$name"] = tensor.copy()
                found.loadMs = listOf(runner.loadMs)
                job.timing?.let { timing ->
                    cool()
                    val spent =
                        List(timing.warmup + timing.runs) {
                            val start = System.nanoTime()
                            graphs.run(step.graph, given)
                            millisecondsSince(start)
                        }
                    found.warmupMs = spent.take(timing.warmup)
                    found.runMs = spent.drop(timing.warmup)
                    look()
                }
            }
        return found
    }

    /** A bundle that is ready to answer. */
    private class Side(val graphs: Graphs, val answers: Answers)

    private fun answer(wanted: AnswerJob, graphs: Graphs): AnswerFound {
        val prune = graphs.manifest.prune
        val found = AnswerFound(prune.imageTokens, prune.keep, wanted.question.size)
        found.trouble =
            troubleOf {
                say("answering")
                // Of the job, so that answers can be compared, or of its photo.
                val pixels = inputs["pixel_values"] ?: outputs["pixel_values"] ?: input("pixel_values")
                val own = Side(graphs, Answers(graphs))
                found.cacheBytes = own.answers.cacheBytes
                own.answers.see(pixels)
                found.ids = own.answers.answer(wanted.question, wanted.newTokens, pastEnd = true)
                val timing = job.timing
                if (timing == null) {
                    found.runs = listOf(AnswerRun(own.answers.times, photoMs, twin = false, warmup = true))
                } else {
                    openTwin().use { twin ->
                        time(timing, wanted, pixels, own, twin?.let { Side(it, Answers(it)) }, found)
                    }
                }
            }
        return found
    }

    private fun time(timing: TimingJob, wanted: AnswerJob, pixels: Tensor, own: Side, twin: Side?, found: AnswerFound) {
        for (turn in 0..timing.answers) {
            say("timing answers, $turn of ${timing.answers}")
            cool()
            // The first turn warms up; the order is swapped each time, so that drift hits both alike.
            for (isTwin in listOf(turn % 2 == 1, turn % 2 == 0)) {
                val side = (if (isTwin) twin else own) ?: continue
                found.runs += timed(side, wanted, pixels, isTwin, turn == 0)
            }
            look()
        }
    }

    private fun timed(side: Side, wanted: AnswerJob, pixels: Tensor, twin: Boolean, warmup: Boolean): AnswerRun {
        var preprocess = 0.0
        var values = pixels
        photo?.let {
            val start = System.nanoTime()
            values = it.pixelValues(side.graphs.manifest.image)
            preprocess = millisecondsSince(start)
        }
        side.answers.see(values)
        side.answers.answer(wanted.question, wanted.newTokens, pastEnd = true)
        return AnswerRun(side.answers.times, preprocess, twin, warmup)
    }

    /** The job's photo; its pixel values are compared, and answered about where the job has none. */
    private fun takePhoto(info: ImageInfo) {
        val tensor = inputs["photo"] ?: return
        val refused =
            troubleOf {
                val taken = Photo.of(tensor)
                val start = System.nanoTime()
                outputs["pixel_values"] = taken.pixelValues(info)
                photoMs = millisecondsSince(start)
                photo = taken
            }
        findings.photoRefused = refused?.message.orEmpty()
    }

    private fun openTwin(): Graphs? {
        val twin = job.twin ?: return null
        say("opening the twin")
        return Graphs.open(Manifest.read(place.twin, Choice.Vision(twin.vision)), place.twin, engines)
    }

    /** Waits until the device is as cool as the job wants it, or no longer throttled where it has no thermometer. */
    private fun cool() {
        val gate = job.gate ?: return
        val start = System.nanoTime()
        var celsius = device.condition().celsius
        while (isHot(celsius, gate) && waitedS + millisecondsSince(start) / 1e3 < gate.waitS) {
            Thread.sleep(1000)
            celsius = device.condition().celsius
        }
        waitedS += millisecondsSince(start) / 1e3
        val before = findings.gate?.passed ?: true
        findings.gate = GateFound(waitedS, celsius?.let { it <= gate.mostCelsius && before })
    }

    private fun isHot(celsius: Double?, gate: GateJob): Boolean =
        if (celsius == null) device.isThrottled else celsius > gate.mostCelsius

    companion object {
        // float16 numbers by their bits.
        private const val ONE: Short = 0x3C00
        private const val TWO_THOUSAND_48: Short = 0x6800

        /** 2026-01-31T12:00:00Z */
        private fun now(): String = Instant.now().truncatedTo(ChronoUnit.SECONDS).toString()
    }
}
