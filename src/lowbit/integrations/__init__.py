"""Other libraries, met through their own extension points. Each module needs the library that it is named after."""
