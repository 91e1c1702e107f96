// From a photo to pixel_values, as the checkpoint's own preprocessor makes them.
#pragma once

#include "array.h"
#include "manifest.h"

namespace pruneport {

// `photo` uint8 (H, W, 3) -> float32 (1, 3, height, width), within a grey level of Pillow's. Throws Trouble.
Array pixel_values(const View& photo, const ImageInfo& info);

}  // namespace pruneport
