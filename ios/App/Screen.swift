// The screen: choose a bundle, show a photo, ask, read the answer as it comes.

import BenchCore
import Foundation
import Observation
import PhotosUI
import SwiftUI
import UIKit

/// What is on the screen.
@MainActor
@Observable
final class Session {
  private(set) var photo: UIImage?
  private(set) var seen: Seen?
  private(set) var answer = ""
  private(set) var ttftMs: Double?
  private(set) var fault: String?
  private(set) var isBusy = false
  private var bench: Bench?
  private var asking: Task<Void, Never>?

  var canAsk: Bool { seen != nil && !isBusy }

  func open(_ name: String) {
    work { [self] in
      (bench, seen, answer) = (nil, nil, "")
      bench = try await Bench.open(documents().appendingPathComponent(name))
      if let photo { seen = try await bench?.see(photo) }
    }
  }

  func show(_ image: UIImage) {
    work { [self] in
      (photo, seen, answer, ttftMs) = (image, nil, "", nil)
      seen = try await bench?.see(image)
    }
  }

  func ask(_ question: String) {
    work { [self] in
      (answer, ttftMs) = ("", nil)
      guard let bench else { return }
      let pieces = bench.ask(question) { ms in Task { @MainActor in self.ttftMs = ms } }
      for try await piece in pieces { answer += piece }
    }
  }

  func stop() { asking?.cancel() }

  /// Does one thing at a time, and shows why it failed.
  private func work(_ what: @escaping @MainActor () async throws -> Void) {
    if isBusy { return }
    (isBusy, fault) = (true, nil)
    asking = Task {
      do { try await what() } catch { fault = "\(error)" }
      isBusy = false
    }
  }
}

struct Screen: View {
  @State private var session = Session()
  @State private var bundles = Bench.bundles()
  @State private var bundle: String?
  @State private var picked: PhotosPickerItem?
  @State private var isTaking = false
  @State private var question = "What is in this picture?"

  var body: some View {
    ScrollView {
      VStack(alignment: .leading, spacing: 12) {
        if bundles.isEmpty {
          Text("Copy a bundle into the documents of this app; its README says how.")
        }
        Picker("Bundle", selection: $bundle) {
          Text("Choose a bundle").tag(String?.none)
          ForEach(bundles, id: \.self) { Text($0).tag(String?.some($0)) }
        }
        HStack {
          PhotosPicker("Choose a photo", selection: $picked, matching: .images)
          if UIImagePickerController.isSourceTypeAvailable(.camera) {
            Button("Take one") { isTaking = true }
          }
        }
        if let photo = session.photo { KeptTokens(photo: photo, seen: session.seen) }
        TextField("Question", text: $question)
        HStack {
          Button("Ask") { session.ask(question) }.disabled(!session.canAsk)
          if session.isBusy {
            ProgressView()
            Button("Stop") { session.stop() }
          }
        }
        if let fault = session.fault { Text(fault).foregroundStyle(.red) }
        Text(session.answer)
        if let seen = session.seen {
          Text("image ready in \(Self.words(seen.imageReadyMs)), \(seen.kept.count) tokens kept")
        }
        if let ttft = session.ttftMs { Text("first token after \(Self.words(ttft))") }
      }
      .padding()
    }
    .onChange(of: bundle) { if let bundle { session.open(bundle) } }
    .onChange(of: picked) { load(picked) }
    .sheet(isPresented: $isTaking) { Camera { session.show($0) } }
  }

  private func load(_ item: PhotosPickerItem?) {
    guard let item else { return }
    Task {
      guard let data = try? await item.loadTransferable(type: Data.self), let image = UIImage(data: data) else {
        return
      }
      session.show(image)
    }
  }

  private static func words(_ ms: Double) -> String { "\(Int(ms.rounded())) ms" }
}

/// A photo, dark where the model sees nothing of it any more.
struct KeptTokens: View {
  let photo: UIImage
  let seen: Seen?

  var body: some View {
    Image(uiImage: photo)
      .resizable()
      .aspectRatio(contentMode: .fit)
      .overlay {
        Canvas { context, size in
          guard let seen, !seen.kept.isEmpty else { return }
          let kept = Set(seen.kept)
          let cell = CGSize(
            width: seen.part.width * size.width / Double(seen.columns),
            height: seen.part.height * size.height / Double(seen.rows))
          let (left, top) = (seen.part.minX * size.width, seen.part.minY * size.height)
          for token in 0..<seen.rows * seen.columns where !kept.contains(token) {
            let (row, column) = (token / seen.columns, token % seen.columns)
            let corner = CGPoint(x: left + Double(column) * cell.width, y: top + Double(row) * cell.height)
            context.fill(Path(CGRect(origin: corner, size: cell)), with: .color(.black.opacity(0.65)))
          }
        }
      }
  }
}

/// The camera, for one photo.
struct Camera: UIViewControllerRepresentable {
  let take: (UIImage) -> Void

  func makeUIViewController(context: Context) -> UIImagePickerController {
    let controller = UIImagePickerController()
    controller.sourceType = .camera
    controller.delegate = context.coordinator
    return controller
  }

  func updateUIViewController(_ controller: UIImagePickerController, context: Context) {}

  func makeCoordinator() -> Coordinator { Coordinator(take) }

  final class Coordinator: NSObject, UIImagePickerControllerDelegate, UINavigationControllerDelegate {
    private let take: (UIImage) -> Void

    init(_ take: @escaping (UIImage) -> Void) { self.take = take }

    func imagePickerController(
      _ picker: UIImagePickerController, didFinishPickingMediaWithInfo info: [UIImagePickerController.InfoKey: Any]
    ) {
      if let image = info[.originalImage] as? UIImage { take(image) }
      picker.dismiss(animated: true)
    }

    func imagePickerControllerDidCancel(_ picker: UIImagePickerController) { picker.dismiss(animated: true) }
  }
}
