// Runs model.pt2 without Python: ./run model.pt2 NEW_TOKENS ID ID ... prints the likeliest tokens after a prompt.
// Build it against the torch that is installed, or against libtorch:
//   TORCH=$(python -c "import torch, os; print(os.path.dirname(torch.__file__))")
//   g++ -O1 -std=c++20 run.cpp -o run -I$TORCH/include -I$TORCH/include/torch/csrc/api/include \
//       -L$TORCH/lib -ltorch -ltorch_cpu -lc10 -Wl,-rpath,$TORCH/lib
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>
#include <iostream>
#include <vector>

constexpr int64_t kBlockSize = @BLOCK_SIZE@, kGroups = @GROUPS@, kBlocks = 256;
// Heads, width and dtype of each cache, in the order of the inputs.
struct Cache {
  int64_t heads, width;
  at::ScalarType dtype;
};
const std::vector<Cache> kCaches = {@CACHES@};

at::Tensor numbers(const std::vector<int64_t>& values) { return at::tensor(values, at::kLong); }

int main(int count, char** words) {
  if (count < 4) {
    std::cerr << "run model.pt2 NEW_TOKENS ID ID ...\n";
    return 2;
  }
  torch::inductor::AOTIModelPackageLoader step(words[1]);
  std::vector<at::Tensor> caches;
  for (const Cache& cache : kCaches)
    caches.push_back(at::zeros({kBlocks, cache.heads, kBlockSize, cache.width}, cache.dtype));
  std::vector<int64_t> tokens;
  for (int i = 3; i < count; ++i) tokens.push_back(std::atoll(words[i]));
  at::Tensor tables = at::arange(kBlocks, at::kLong).expand({kGroups, 1, kBlocks}).contiguous();
  int64_t length = 0;
  for (int64_t left = std::atoll(words[2]); left > 0; --left) {
    const int64_t fresh = tokens.size();
    length += fresh;
    std::vector<at::Tensor> inputs = {numbers(tokens),      numbers({fresh}),     numbers({length}),
                                      tables,               numbers({fresh - 1}), at::arange(fresh, at::kLong)};
    inputs.insert(inputs.end(), caches.begin(), caches.end());
    tokens = {step.run(inputs)[0][0].argmax().item<int64_t>()};
    std::cout << tokens[0] << (left > 1 ? "," : "\n");
  }
}
