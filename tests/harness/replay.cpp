// SPDX-License-Identifier: Apache-2.0
// Runs recorded operator calls without Python, for sanitizers: replay CALLS LIBRARY...
// CALLS is what torch.save wrote: (schemas, [(operator, arguments), ...]).
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <torch/csrc/jit/serialization/import_read.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/library.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <vector>

namespace {

std::vector<char> read_file(const char* path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// Lists lose their type in a file.
c10::IValue with_type(const c10::IValue& value, const c10::TypePtr& type) {
  if (const auto optional = type->cast<c10::OptionalType>()) {
    return value.isNone() ? value : with_type(value, optional->getElementType());
  }
  const auto list = type->cast<c10::ListType>();
  if (!list) return value;
  c10::impl::GenericList typed(list->getElementType());
  for (const c10::IValue& item : value.toListRef()) typed.push_back(item);
  return typed;
}

void call(const std::string& name, c10::ArrayRef<c10::IValue> arguments) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
  torch::jit::Stack stack;
  for (size_t i = 0; i < arguments.size(); ++i) {
    stack.push_back(with_type(arguments[i], op.schema().arguments()[i].type()));
  }
  op.callBoxed(stack);
}

}  // namespace

int main(int count, char** words) {
  if (count < 3) {
    std::fprintf(stderr, "replay: expected CALLS LIBRARY...\n");
    return 2;
  }
  try {
    const c10::IValue file = torch::jit::pickle_load(read_file(words[1]));
    const auto& parts = file.toTupleRef().elements();
    torch::Library schemas(torch::Library::DEF, "l0kernels_harness", std::nullopt, __FILE__,
                           __LINE__);
    for (const c10::IValue& schema : parts[0].toListRef()) schemas.def(schema.toStringRef().c_str());
    for (int i = 2; i < count; ++i) {
      TORCH_CHECK(dlopen(words[i], RTLD_NOW) != nullptr, dlerror());
    }
    for (const c10::IValue& recorded : parts[1].toListRef()) {
      const auto& pair = recorded.toTupleRef().elements();
      call("l0kernels_harness::" + pair[0].toStringRef(), pair[1].toTupleRef().elements());
      std::printf("%s\n", pair[0].toStringRef().c_str());
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
