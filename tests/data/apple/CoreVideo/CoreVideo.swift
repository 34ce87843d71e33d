import CoreGraphics

public typealias OSType = UInt32
public typealias CVReturn = Int32
public final class CFAllocator {}

public let kCVPixelFormatType_32BGRA: OSType = 0x4247_5241
public let kCVPixelBufferIOSurfacePropertiesKey: CFString = "IOSurfaceProperties"

public struct CVPixelBufferLockFlags: OptionSet, Sendable {
    public let rawValue: UInt64
    public init(rawValue: UInt64) { self.rawValue = rawValue }
    public static let readOnly = CVPixelBufferLockFlags(rawValue: 1)
}

public final class CVBuffer {
    public let width, height, bytesPerRow: Int
    public let memory: UnsafeMutableRawPointer
    public fileprivate(set) var locks = 0

    fileprivate init(_ width: Int, _ height: Int) {
        (self.width, self.height, bytesPerRow) = (width, height, (width * 4 + 63) / 64 * 64 + 64)
        memory = .allocate(byteCount: bytesPerRow * height, alignment: 64)
    }

    deinit { memory.deallocate() }
}

public typealias CVPixelBuffer = CVBuffer

@discardableResult
public func CVPixelBufferCreate(
    _ allocator: CFAllocator?, _ width: Int, _ height: Int, _ format: OSType, _ attributes: CFDictionary?,
    _ made: UnsafeMutablePointer<CVPixelBuffer?>
) -> CVReturn {
    guard format == kCVPixelFormatType_32BGRA, attributes?[kCVPixelBufferIOSurfacePropertiesKey] != nil else { return -1 }
    made.pointee = CVBuffer(width, height)
    return 0
}

@discardableResult
public func CVPixelBufferLockBaseAddress(_ buffer: CVPixelBuffer, _ flags: CVPixelBufferLockFlags) -> CVReturn {
    buffer.locks += 1
    return 0
}

@discardableResult
public func CVPixelBufferUnlockBaseAddress(_ buffer: CVPixelBuffer, _ flags: CVPixelBufferLockFlags) -> CVReturn {
    buffer.locks -= 1
    return 0
}

public func CVPixelBufferGetBaseAddress(_ buffer: CVPixelBuffer) -> UnsafeMutableRawPointer? {
    buffer.locks > 0 ? buffer.memory : nil
}

public func CVPixelBufferGetBytesPerRow(_ buffer: CVPixelBuffer) -> Int { buffer.bytesPerRow }
public func CVPixelBufferGetWidth(_ buffer: CVPixelBuffer) -> Int { buffer.width }
public func CVPixelBufferGetHeight(_ buffer: CVPixelBuffer) -> Int { buffer.height }
public func CVPixelBufferGetPixelFormatType(_ buffer: CVPixelBuffer) -> OSType { kCVPixelFormatType_32BGRA }
