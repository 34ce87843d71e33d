@_exported import CoreVideo
@_exported import Foundation

public enum MLComputeUnits: Int, Sendable { case cpuOnly, cpuAndGPU, all, cpuAndNeuralEngine }

public final class MLModelConfiguration {
    public var computeUnits = MLComputeUnits.all
    public init() {}
}

public final class MLImageConstraint {
    public let pixelsWide, pixelsHigh: Int
    init(_ shape: [Int]) { (pixelsHigh, pixelsWide) = (shape[2], shape[3]) }
}

public final class MLMultiArrayConstraint {
    public let shape: [NSNumber]
    init(_ shape: [Int]) { self.shape = shape.map { NSNumber(value: $0) } }
}

public final class MLFeatureDescription {
    public let imageConstraint: MLImageConstraint?
    public let multiArrayConstraint: MLMultiArrayConstraint?
    init(_ about: Feature) {
        imageConstraint = about.dtype == "image" ? MLImageConstraint(about.shape) : nil
        multiArrayConstraint = about.dtype == "image" ? nil : MLMultiArrayConstraint(about.shape)
    }
}

public final class MLModelDescription {
    public let inputDescriptionsByName, outputDescriptionsByName: [String: MLFeatureDescription]
    init(_ about: Description) {
        inputDescriptionsByName = about.inputs.mapValues(MLFeatureDescription.init)
        outputDescriptionsByName = about.outputs.mapValues(MLFeatureDescription.init)
    }
}

struct Feature: Codable {
    let shape: [Int]
    let dtype: String
}

/// What `description.json` of a package says here.
struct Description: Codable {
    let inputs, outputs: [String: Feature]
}

public enum MLMultiArrayDataType: Int, Sendable {
    case float16 = 65552
    case float32 = 65568
    case double = 65600
    case int32 = 131104
}

public final class MLMultiArray {
    public let shape, strides: [NSNumber]
    public let dataType: MLMultiArrayDataType
    let memory: UnsafeMutableRawBufferPointer

    /// Rows (of the last axis) are `gap` elements apart.
    init(_ shape: [Int], _ dataType: MLMultiArrayDataType, gap: Int) {
        var (steps, step) = ([Int](), 1)
        for (axis, size) in shape.enumerated().reversed() {
            steps.insert(step, at: 0)
            step *= size
            if axis == shape.count - 1 { step += gap }
        }
        self.shape = shape.map { NSNumber(value: $0) }
        strides = steps.map { NSNumber(value: $0) }
        self.dataType = dataType
        memory = .allocate(byteCount: step * (dataType == .float16 ? 2 : 4), alignment: 64)
        _ = memory.initializeMemory(as: UInt8.self, repeating: 0xFF)
    }

    public convenience init(shape: [NSNumber], dataType: MLMultiArrayDataType) throws {
        self.init(shape.map(\.intValue), dataType, gap: 0)
    }

    deinit { memory.deallocate() }

    public func withUnsafeBytes<R>(_ body: (UnsafeRawBufferPointer) throws -> R) rethrows -> R {
        try body(UnsafeRawBufferPointer(memory))
    }

    public func withUnsafeMutableBytes<R>(_ body: (UnsafeMutableRawBufferPointer, [Int]) throws -> R) rethrows -> R {
        try body(memory, strides.map(\.intValue))
    }
}

public final class MLFeatureValue {
    public let multiArrayValue: MLMultiArray?
    let pixelBuffer: CVPixelBuffer?
    public init(multiArray: MLMultiArray) { (multiArrayValue, pixelBuffer) = (multiArray, nil) }
    public init(pixelBuffer: CVPixelBuffer) { (multiArrayValue, self.pixelBuffer) = (nil, pixelBuffer) }
}

public protocol MLFeatureProvider {
    func featureValue(for name: String) -> MLFeatureValue?
}

public final class MLDictionaryFeatureProvider: MLFeatureProvider {
    let values: [String: MLFeatureValue]
    public init(dictionary: [String: Any]) throws { values = dictionary.mapValues { $0 as! MLFeatureValue } }
    public func featureValue(for name: String) -> MLFeatureValue? { values[name] }
}

/// A package that is a folder with `description.json`; its predictions are made by whoever answers the files that appear in
/// the folder $CORE_ML.
public final class MLModel {
    public let modelDescription: MLModelDescription
    private let place: URL
    private let about: Description

    private init(_ compiled: URL) throws {
        about = try JSONDecoder().decode(
            Description.self, from: Data(contentsOf: compiled.appendingPathComponent("description.json")))
        modelDescription = MLModelDescription(about)
        place = compiled
    }

    public static func load(contentsOf url: URL, configuration: MLModelConfiguration) async throws -> MLModel {
        precondition(url.pathExtension == "mlmodelc", "compiled")
        return try MLModel(url)
    }

    public static func compileModel(at url: URL) async throws -> URL {
        let made = FileManager.default.temporaryDirectory.appendingPathComponent("\(UUID().uuidString).mlmodelc")
        try FileManager.default.copyItem(at: url, to: made)
        return made
    }

    public func prediction(from input: MLFeatureProvider) throws -> MLFeatureProvider {
        let values = (input as! MLDictionaryFeatureProvider).values
        precondition(Set(values.keys) == Set(about.inputs.keys), "the inputs of \(place.path)")
        let folder = URL(fileURLWithPath: ProcessInfo.processInfo.environment["CORE_ML"]!)
            .appendingPathComponent(UUID().uuidString)
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        for (name, value) in values { try bytes(of: value, about.inputs[name]!).write(to: folder.appendingPathComponent(name)) }
        try Data(place.lastPathComponent.utf8).write(to: folder.appendingPathComponent("asked"), options: .atomic)
        let answered = folder.appendingPathComponent("answered")
        for _ in 0..<60_000 where !FileManager.default.fileExists(atPath: answered.path) { usleep(1000) }
        var outputs = [String: Any]()
        for (name, feature) in about.outputs {
            let made = MLMultiArray(feature.shape, .float16, gap: 7)
            let values = [UInt8](try Data(contentsOf: folder.appendingPathComponent(name)))
            let (row, rows) = (feature.shape.last! * 2, values.count / (feature.shape.last! * 2))
            for number in 0..<rows {
                for byte in 0..<row { made.memory[number * (row + 14) + byte] = values[number * row + byte] }
            }
            outputs[name] = MLFeatureValue(multiArray: made)
        }
        return try MLDictionaryFeatureProvider(dictionary: outputs)
    }

    /// A picture as blue, green, red, 255; an array without gaps.
    private func bytes(of value: MLFeatureValue, _ feature: Feature) -> Data {
        if let buffer = value.pixelBuffer {
            precondition(feature.dtype == "image" && buffer.locks == 0 && [buffer.height, buffer.width] == Array(feature.shape[2...]))
            var found = Data()
            for y in 0..<buffer.height { found.append(Data(bytes: buffer.memory + y * buffer.bytesPerRow, count: buffer.width * 4)) }
            return found
        }
        let array = value.multiArrayValue!
        precondition(array.shape.map(\.intValue) == feature.shape, "\(array.shape), and not \(feature.shape)")
        precondition((array.dataType == .float16) == (feature.dtype == "float16"), "another type")
        let size = array.dataType == .float16 ? 2 : 4
        let row = feature.shape.last! * size
        let step = (array.shape.count > 1 ? array.strides[array.shape.count - 2].intValue : feature.shape.last!) * size
        var found = Data()
        for number in 0..<feature.shape.dropLast().reduce(1, *) {
            found.append(Data(bytes: array.memory.baseAddress! + number * step, count: row))
        }
        return found
    }
}
