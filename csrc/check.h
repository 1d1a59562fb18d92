// One macro for every check at the boundary; bindings.cpp turns ff::Error into ValueError once.
#pragma once
#include <sstream>
#include <stdexcept>

namespace ff {
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
}  // namespace ff

#define FF_CHECK(condition, message)   \
  do {                                 \
    if (!(condition)) {                \
      std::ostringstream ff_text;      \
      ff_text << message;              \
      throw ::ff::Error(ff_text.str()); \
    }                                  \
  } while (0)
