#if canImport(CoreML)
import CoreGraphics
import CoreVideo
import Foundation
import SegmentAnything
import XCTest

/// The packages beside this folder at work: `swift test` on a Mac, within the export.
final class OnAMacTests: XCTestCase {
    /// What PyTorch makes of a prompt on the example; `runs` are pixels off the object, on it, off it, …
    private struct Expected: Decodable {
        let points: [[Double]]
        let labels: [Int]
        let box: [Double]
        let predicted_iou: Float
        let runs: [Int]
    }

    private let example = URL(fileURLWithPath: #filePath).deletingLastPathComponent().appendingPathComponent("Example")

    private func segmenter() async throws -> Segmenter {
        let export = example.appendingPathComponent("../../../..").standardizedFileURL
        guard let (encoder, decoder) = try? Packages.pair(in: export) else {
            throw XCTSkip("no packages in \(export.path)")
        }
        return try await Segmenter(encoder: encoder, decoder: decoder)
    }

    func testMasksArePyTorchs() async throws {
        let segmenter = try await segmenter()
        let picture = try await segmenter.embed(contentsOf: example.appendingPathComponent("example.png"))
        let file = try Data(contentsOf: example.appendingPathComponent("expected.json"))
        var ious = [Double]()
        for expected in try JSONDecoder().decode([Expected].self, from: file) {
            let corners = expected.box
            let mask = try await segmenter.mask(
                for: picture, points: expected.points.map { CGPoint(x: $0[0], y: $0[1]) }, labels: expected.labels,
                box: corners.isEmpty
                    ? nil
                    : CGRect(
                        x: corners[0], y: corners[1], width: corners[2] - corners[0], height: corners[3] - corners[1]))
            XCTAssertEqual(mask.size, picture.size)
            XCTAssertEqual(mask.cgImage?.width, picture.size.width)
            XCTAssertEqual(mask.predictedIoU, expected.predicted_iou, accuracy: 0.05)
            ious.append(iou(mask, expected.runs))
        }
        print("IoU with PyTorch's masks: \(ious)")
        XCTAssertGreaterThanOrEqual(ious.count, 4)
        XCTAssertGreaterThanOrEqual(ious.min() ?? 0, 0.9)
        XCTAssertGreaterThanOrEqual(ious.reduce(0, +) / Double(ious.count), 0.97)
    }

    private func iou(_ mask: Mask, _ runs: [Int]) -> Double {
        var (pixel, on, both, either) = (0, false, 0, mask.area)
        for run in runs {
            if on {
                let shared = mask.bytes[pixel..<(pixel + run)].filter { $0 > 0 }.count
                both += shared
                either += run - shared
            }
            pixel += run
            on.toggle()
        }
        XCTAssertEqual(pixel, mask.bytes.count)
        return either == 0 ? 1 : Double(both) / Double(either)
    }

    func testAMaskIsCorrectedAndAnsweredAtAnotherSize() async throws {
        let segmenter = try await segmenter()
        let picture = try await segmenter.embed(contentsOf: example.appendingPathComponent("example.png"))
        let (width, height) = (Double(picture.size.width), Double(picture.size.height))
        let points = [CGPoint(x: width / 2, y: height / 2), CGPoint(x: width / 8, y: height / 8)]
        let mask = try await segmenter.mask(for: picture, points: points, labels: [1, 0])
        let again = try await segmenter.mask(for: picture, points: points, labels: [1, 0])
        XCTAssertEqual(again.bytes, mask.bytes)
        let corrected = try await segmenter.mask(for: picture, points: points, labels: [1, 0], previous: mask)
        XCTAssertNotEqual(corrected.logits, mask.logits)
        let size = PixelSize(width: picture.size.width / 2, height: picture.size.height / 2)
        let small = try await segmenter.mask(for: picture, points: points, labels: [1, 0], at: size)
        XCTAssertEqual(small.size, size)
        XCTAssertEqual(small.logits, mask.logits)
        XCTAssertEqual(Double(small.area) * 4, Double(mask.area), accuracy: Double(mask.area) / 10 + 100)
    }

    func testAPictureOnItsSideIsTurned() async throws {
        let segmenter = try await segmenter()
        let upright = try await segmenter.embed(contentsOf: example.appendingPathComponent("example.png"))
        let source = try XCTUnwrap(grey(width: 30, height: 20))
        let lying = try await segmenter.embed(source, orientation: .right)
        XCTAssertEqual(lying.size, PixelSize(width: 20, height: 30))
        XCTAssertNotEqual(upright.size, lying.size)
    }

    func testACamerasFrame() async throws {
        var made: CVPixelBuffer?
        let attributes: [CFString: Any] = [kCVPixelBufferIOSurfacePropertiesKey: [CFString: Any]()]
        CVPixelBufferCreate(nil, 192, 108, kCVPixelFormatType_32BGRA, attributes as CFDictionary, &made)
        let segmenter = try await segmenter()
        let picture = try await segmenter.embed(try XCTUnwrap(made), orientation: .right)
        XCTAssertEqual(picture.size, PixelSize(width: 108, height: 192))
        let mask = try await segmenter.mask(for: picture, box: CGRect(x: 20, y: 20, width: 60, height: 60))
        XCTAssertEqual(mask.bytes.count, 108 * 192)
    }

    func testAnEmptyPromptIsRefused() async throws {
        let segmenter = try await segmenter()
        let picture = try await segmenter.embed(contentsOf: example.appendingPathComponent("example.png"))
        do {
            _ = try await segmenter.mask(for: picture)
            XCTFail("it was not")
        } catch {
            XCTAssertEqual(error as? SegmenterError, .emptyPrompt)
        }
    }

    private func grey(width: Int, height: Int) -> CGImage? {
        guard
            let provider = CGDataProvider(data: Data(repeating: 128, count: width * height * 4) as CFData),
            let space = CGColorSpace(name: CGColorSpace.sRGB)
        else { return nil }
        return CGImage(
            width: width, height: height, bitsPerComponent: 8, bitsPerPixel: 32, bytesPerRow: width * 4, space: space,
            bitmapInfo: CGBitmapInfo(rawValue: CGImageAlphaInfo.noneSkipLast.rawValue), provider: provider, decode: nil,
            shouldInterpolate: false, intent: .defaultIntent)
    }
}
#endif
