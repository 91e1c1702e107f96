// The screen: choose a bundle, show a photo, ask, read the answer as it comes.

package io.pruneport.app

import android.app.Activity
import android.content.ActivityNotFoundException
import android.content.ClipData
import android.content.Intent
import android.graphics.Bitmap
import android.graphics.Color
import android.net.Uri
import android.os.Bundle
import android.provider.MediaStore
import android.text.InputType
import android.view.View
import android.view.ViewGroup
import android.widget.AdapterView
import android.widget.ArrayAdapter
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.Spinner
import android.widget.TextView
import java.io.File
import java.io.IOException
import java.util.concurrent.Executors

/** Its views are built here; whatever takes time happens on one thread of its own. */
class MainActivity : Activity() {
    private val worker = Executors.newSingleThreadExecutor()
    private var folders = emptyList<File>()
    private var photo: Bitmap? = null
    private var seen: Seen? = null
    private var isBusy = false

    /** Used by the worker alone. */
    private var open: OpenBundle? = null

    @Volatile private var isStopped = false

    private lateinit var hint: TextView
    private lateinit var chooser: Spinner
    private lateinit var pick: Button
    private lateinit var take: Button
    private lateinit var picture: KeptTokens
    private lateinit var question: EditText
    private lateinit var ask: Button
    private lateinit var stop: Button
    private lateinit var fault: TextView
    private lateinit var answer: TextView
    private lateinit var ready: TextView
    private lateinit var speed: TextView

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        val list = LinearLayout(this)
        list.orientation = LinearLayout.VERTICAL
        val space = (SPACE_DP * resources.displayMetrics.density).toInt()
        list.setPadding(space, space, space, space)
        hint = TextView(this)
        chooser = Spinner(this)
        pick = button(R.string.choose_photo) { pickPhoto() }
        take = button(R.string.take_photo) { takePhoto() }
        picture = KeptTokens(this)
        picture.contentDescription = getString(R.string.photo)
        question = EditText(this)
        question.hint = getString(R.string.question)
        question.inputType = InputType.TYPE_CLASS_TEXT or InputType.TYPE_TEXT_FLAG_CAP_SENTENCES
        question.setText(R.string.first_question)
        ask = button(R.string.ask) { ask(question.text.toString()) }
        stop = button(R.string.stop) { isStopped = true }
        fault = TextView(this)
        fault.setTextColor(FAULT)
        answer = TextView(this)
        answer.textSize = ANSWER_SP
        answer.setTextIsSelectable(true)
        ready = TextView(this)
        speed = TextView(this)
        val all = listOf(hint, chooser, row(pick, take), picture, question, row(ask, stop), fault, answer, ready, speed)
        for (view in all) list.addView(view, ViewGroup.LayoutParams.MATCH_PARENT, ViewGroup.LayoutParams.WRAP_CONTENT)
        val page = ScrollView(this)
        page.fitsSystemWindows = true
        page.addView(list)
        setContentView(page)
        chooser.onItemSelectedListener =
            object : AdapterView.OnItemSelectedListener {
                override fun onItemSelected(parent: AdapterView<*>?, view: View?, position: Int, id: Long) {
                    folders.getOrNull(position - 1)?.let { open(it) }
                }

                override fun onNothingSelected(parent: AdapterView<*>?) = Unit
            }
        refresh()
    }

    override fun onResume() {
        super.onResume()
        val found = bundles(this)
        if (found == folders && chooser.adapter != null) return
        folders = found
        val names = listOf(getString(R.string.choose_bundle)) + found.map { it.name }
        chooser.adapter = ArrayAdapter(this, android.R.layout.simple_spinner_dropdown_item, names)
        val place = bundlesFolder(this)
        hint.text = if (place == null) getString(R.string.no_storage) else getString(R.string.no_bundle, place.path)
        refresh()
    }

    override fun onDestroy() {
        super.onDestroy()
        isStopped = true
        worker.execute { open?.close() }
        worker.shutdown()
    }

    private fun button(text: Int, act: () -> Unit): Button {
        val button = Button(this)
        button.setText(text)
        button.setOnClickListener { act() }
        return button
    }

    private fun row(vararg views: View): LinearLayout {
        val row = LinearLayout(this)
        for (view in views) row.addView(view)
        return row
    }

    private fun refresh() {
        hint.visibility = if (folders.isEmpty()) View.VISIBLE else View.GONE
        chooser.isEnabled = !isBusy && folders.isNotEmpty()
        for (button in listOf(pick, take)) button.isEnabled = !isBusy
        ask.isEnabled = !isBusy && seen != null
        stop.isEnabled = isBusy
        picture.show(photo, seen)
        val told = seen
        ready.text =
            when {
                isBusy && told == null -> getString(R.string.working)
                told == null -> ""
                told.kept == null -> getString(R.string.ready_unknown, Math.round(told.readyMs))
                else -> getString(R.string.ready, Math.round(told.readyMs), told.kept.size, told.rows * told.columns)
            }
    }

    /** Does one thing at a time away from the screen, and says why it failed. */
    private fun work(what: () -> Unit) {
        isBusy = true
        isStopped = false
        fault.text = ""
        refresh()
        worker.execute {
            var failed: Throwable? = null
            try {
                what()
            } catch (error: Exception) {
                failed = error
            } catch (error: OutOfMemoryError) {
                failed = error
            } catch (error: LinkageError) {
                failed = error
            }
            runOnUiThread {
                isBusy = false
                failed?.let { fault.text = said(it) }
                refresh()
            }
        }
    }

    private fun open(folder: File) {
        if (isBusy) return
        seen = null
        clearAnswer()
        work {
            open?.close()
            open = null
            open = OpenBundle(folder, allEngines(applicationContext))
            see()
        }
    }

    /** Prefills the photo that is shown, where a bundle is open. */
    private fun see() {
        val bitmap = photo ?: return
        val found = open?.see(bitmap) ?: return
        runOnUiThread { seen = found }
    }

    private fun show(read: () -> Bitmap) {
        if (isBusy) return
        seen = null
        clearAnswer()
        work {
            val bitmap =
                try {
                    read()
                } catch (error: IOException) {
                    throw IOException(getString(R.string.no_photo, said(error)))
                } catch (error: SecurityException) {
                    throw IOException(getString(R.string.no_photo, said(error)))
                }
            photo = bitmap
            runOnUiThread { picture.show(bitmap, null) }
            see()
        }
    }

    private fun clearAnswer() {
        answer.text = ""
        speed.text = ""
    }

    private fun ask(text: String) {
        if (isBusy) return
        clearAnswer()
        work {
            val bundle = open ?: return@work
            bundle.ask(text) { piece ->
                val first = Math.round(bundle.times.ttftQuestion)
                val spent = bundle.times.tokens
                runOnUiThread {
                    answer.append(piece)
                    val seconds = spent.sum() / 1000
                    speed.text =
                        if (seconds > 0) {
                            getString(R.string.speed, first, spent.size / seconds)
                        } else {
                            getString(R.string.first_token, first)
                        }
                }
                !isStopped
            }
        }
    }

    private fun pickPhoto() {
        val intent = Intent(Intent.ACTION_OPEN_DOCUMENT)
        intent.addCategory(Intent.CATEGORY_OPENABLE)
        intent.type = "image/*"
        start(intent, PICK, R.string.no_picker)
    }

    private fun takePhoto() {
        CameraFile.file(this).delete()
        val intent = Intent(MediaStore.ACTION_IMAGE_CAPTURE)
        intent.putExtra(MediaStore.EXTRA_OUTPUT, CameraFile.URI)
        intent.clipData = ClipData.newRawUri("", CameraFile.URI)
        intent.addFlags(Intent.FLAG_GRANT_WRITE_URI_PERMISSION or Intent.FLAG_GRANT_READ_URI_PERMISSION)
        start(intent, TAKE, R.string.no_camera)
    }

    private fun start(intent: Intent, code: Int, missing: Int) {
        try {
            startActivityForResult(intent, code)
        } catch (_: ActivityNotFoundException) {
            fault.setText(missing)
        }
    }

    override fun onActivityResult(requestCode: Int, resultCode: Int, data: Intent?) {
        super.onActivityResult(requestCode, resultCode, data)
        if (resultCode != RESULT_OK) return
        val resolver = contentResolver
        if (requestCode == PICK) {
            val uri: Uri = data?.data ?: return
            show { readPhoto(resolver, uri) }
        } else if (requestCode == TAKE) {
            // Some cameras write no file and hand a small picture back.
            val small: Bitmap? = data?.getParcelableExtra("data")
            val isWritten = CameraFile.file(this).length() > 0
            show { if (!isWritten && small != null) small else readPhoto(resolver, CameraFile.URI) }
        }
    }

    private companion object {
        const val PICK = 1
        const val TAKE = 2
        const val SPACE_DP = 16
        const val ANSWER_SP = 18f
        val FAULT = Color.rgb(0xB0, 0x20, 0x20)
    }
}
