@_exported import Foundation

public typealias CFString = String
public typealias CFURL = URL
public typealias CFData = Data
public typealias CFDictionary = [CFString: Any]

public enum CGImageAlphaInfo: UInt32 {
    case none, premultipliedLast, premultipliedFirst, last, first, noneSkipLast, noneSkipFirst, alphaOnly
}

public struct CGBitmapInfo: OptionSet, Sendable {
    public let rawValue: UInt32
    public init(rawValue: UInt32) { self.rawValue = rawValue }
    public static let alphaInfoMask = CGBitmapInfo(rawValue: 0x1F)
    public static let byteOrder32Little = CGBitmapInfo(rawValue: 2 << 12)
}

public enum CGColorRenderingIntent: Int32 { case defaultIntent }
public enum CGInterpolationQuality: Int32 { case `default`, none, low, medium, high }
public enum CGBlendMode: Int32 { case normal, copy }

public final class CGColorSpace: Sendable {
    public static let sRGB: CFString = "kCGColorSpaceSRGB"
    let channels: Int
    init(channels: Int) { self.channels = channels }
    public convenience init?(name: CFString) {
        guard name == Self.sRGB else { return nil }
        self.init(channels: 3)
    }
}

public func CGColorSpaceCreateDeviceGray() -> CGColorSpace { CGColorSpace(channels: 1) }

public final class CGDataProvider: Sendable {
    let bytes: Data
    public init?(data: CFData) { bytes = data }
}

/// Of 8 bits, four bytes a pixel: red, green, blue, alpha; or one, grey.
public final class CGImage: @unchecked Sendable {
    public let width, height, bitsPerComponent, bitsPerPixel, bytesPerRow: Int
    public let colorSpace: CGColorSpace?
    public let bitmapInfo: CGBitmapInfo
    public let dataProvider: CGDataProvider?
    public let decode: UnsafePointer<CGFloat>? = nil
    public var alphaInfo: CGImageAlphaInfo { CGImageAlphaInfo(rawValue: bitmapInfo.rawValue & 0x1F)! }

    public init?(
        width: Int, height: Int, bitsPerComponent: Int, bitsPerPixel: Int, bytesPerRow: Int, space: CGColorSpace,
        bitmapInfo: CGBitmapInfo, provider: CGDataProvider, decode: UnsafePointer<CGFloat>?, shouldInterpolate: Bool,
        intent: CGColorRenderingIntent
    ) {
        guard bitsPerComponent == 8, provider.bytes.count >= bytesPerRow * height else { return nil }
        guard bitsPerPixel == (space.channels == 1 ? 8 : 32), bytesPerRow >= width * bitsPerPixel / 8 else { return nil }
        (self.width, self.height, self.bytesPerRow) = (width, height, bytesPerRow)
        (self.bitsPerComponent, self.bitsPerPixel) = (bitsPerComponent, bitsPerPixel)
        (colorSpace, self.bitmapInfo, dataProvider) = (space, bitmapInfo, provider)
    }

    public var bytes: Data { dataProvider!.bytes }
}

/// Of the one kind that is asked for: blue, green, red and nothing. What is drawn lies over black.
public final class CGContext {
    public let width, height, bytesPerRow: Int
    private let memory: UnsafeMutableRawPointer
    public var data: UnsafeMutableRawPointer? { memory }
    public var interpolationQuality = CGInterpolationQuality.default

    public init?(
        data: UnsafeMutableRawPointer?, width: Int, height: Int, bitsPerComponent: Int, bytesPerRow: Int,
        space: CGColorSpace, bitmapInfo: UInt32
    ) {
        let info = CGBitmapInfo.byteOrder32Little.rawValue | CGImageAlphaInfo.noneSkipFirst.rawValue
        guard data == nil, bitsPerComponent == 8, bytesPerRow == 0, bitmapInfo == info, width > 0, height > 0 else {
            return nil
        }
        (self.width, self.height) = (width, height)
        self.bytesPerRow = (width * 4 + 63) / 64 * 64
        memory = .allocate(byteCount: self.bytesPerRow * height, alignment: 64)
        memory.initializeMemory(as: UInt8.self, repeating: 0, count: self.bytesPerRow * height)
    }

    deinit {
        memory.initializeMemory(as: UInt8.self, repeating: 0xAA, count: bytesPerRow * height)
        memory.deallocate()
    }

    public func setBlendMode(_ mode: CGBlendMode) {}

    public func draw(_ image: CGImage, in place: CGRect) {
        precondition(place == CGRect(x: 0, y: 0, width: width, height: height), "nothing is resampled")
        precondition(image.width == width && image.height == height && image.bitsPerPixel == 32)
        let opaque = image.alphaInfo == .noneSkipLast
        precondition(opaque || image.alphaInfo == .last, "a kind that this knows")
        let bytes = [UInt8](image.bytes)
        for y in 0..<height {
            for x in 0..<width {
                let from = y * image.bytesPerRow + x * 4
                let alpha = opaque ? 255 : Int(bytes[from + 3])
                for channel in 0..<3 {
                    let value = UInt8((Int(bytes[from + channel]) * alpha + 127) / 255)
                    memory.storeBytes(of: value, toByteOffset: y * bytesPerRow + x * 4 + 2 - channel, as: UInt8.self)
                }
            }
        }
    }
}
