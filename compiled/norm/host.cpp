// `HeadNorm` of function.py for eager calls on a GPU: the same steps in the same order, without Python.
//
// With a few thousand tokens, launching a kernel from Python takes longer than the kernel. Here a step's first call with
// arguments of a kind goes to launches.py, which has Triton compile the kernels and launches them. The kernels are kept,
// and later calls with arguments of that kind launch them through the driver. Arguments of one kind have the same
// dtypes, alignment, strides and sizes; they may differ in values, addresses and the number of tokens. (Where a stride
// depends on the number of tokens, each number is a kind of its own.) If launches.py returns no kernels to keep, as in
// Triton's interpreter, every call goes there.
//
// This is the law of function.py a second time, and is kept because it pays: the same kernels through one generic C++
// launch, with the autograd function in Python alone, took 1.6 times as long for an eager forward and backward pass over
// 4096 tokens at TP 1 (316 and 508 us on an H200), 2.2 times with the split and RoPE, and 1.6 times at TP 2; over 32768
// tokens 1.2 to 1.5 times (tests/benchmarks/results/norm_generic_launch_h200.json). The bits were the same.

#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/bit_cast.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/utils/pybind.h>

namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using Sizes = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

// ----------------------------------------------------------------------------------------------------------- launches

// The arguments of a kernel in kernels.py's order, tuples flattened, and their kind.
class Arguments {
 public:
  Arguments(int64_t step, at::Device device) : kind{step, device.index()}, device(device) {}

  void tensor(const Tensor& x, int64_t offset = 0) {
    TORCH_CHECK_VALUE(x.device() == device, "found a tensor on ", x.device(), " beside one on ", device,
                      ": move the norm's inputs, weights, cos and sin to one device");
    auto address = reinterpret_cast<uint64_t>(x.const_data_ptr()) + offset * x.element_size();
    add(address, static_cast<int64_t>(x.scalar_type()) * 2 + (address % 16 == 0));
  }
  void maybe(const MaybeTensor& x) {
    x ? tensor(*x) : none();
  }
  void integer(int64_t value) {
    add(value, value);
  }
  void free(int64_t value) {  // the same code serves any value
    add(value, 0);
  }
  void real(float value) {
    add(c10::bit_cast<uint32_t>(value), 0);  // the same for all of a norm's calls
  }
  void none() {
    add(0, -1);
  }
  // With the strides over seq, batch, and groups or heads.
  void view(const Tensor& x, int64_t offset = 0) {
    tensor(x, offset);
    for (int64_t axis = 0; axis < 3; ++axis) integer(x.stride(axis));
  }

  std::vector<uint64_t> values;
  Sizes kind;
  at::Device device;

 private:
  void add(uint64_t value, int64_t of_kind) {
    values.push_back(value);
    kind.push_back(of_kind);
  }
};

template <typename Function>
Function symbol(const char* library, const char* name) {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  void* found = handle ? dlsym(handle, name) : nullptr;
  TORCH_CHECK(found, "no ", name, " in ", library, ", which a process that uses a GPU has loaded");
  return reinterpret_cast<Function>(found);
}

// `host.Relaunch`.
struct Kernel {
  py::object compiled;  // unloads the function when it is freed
  void* function;
  unsigned warps, shared;
  Sizes taken;
  int64_t programs;

  void launch(int64_t programs, Arguments& arguments) const {
    using Launch = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                           void**);
    using StreamOf = int (*)(int32_t, void**);
    static const auto launch = symbol<Launch>("libcuda.so.1", "cuLaunchKernel");
    static const auto stream_of = symbol<StreamOf>("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream");
    void* stream = nullptr;
    TORCH_CHECK(stream_of(arguments.device.index(), &stream) == 0, "torch does not tell the current stream");
    std::vector<void*> parameters;
    for (int64_t place : taken) parameters.push_back(&arguments.values[place]);
    uint64_t no_scratch = 0;  // Triton's kernels take two more pointers, to scratch memory if they want some
    parameters.insert(parameters.end(), 2, &no_scratch);
    auto run = [&] {
      return launch(function, programs, 1, 1, 32 * warps, 1, 1, shared, stream, parameters.data(), nullptr);
    };
    int error = run();
    if (error == 201) {  // this thread has not used the GPU yet
      use_device(arguments.device.index());
      error = run();
    }
    TORCH_CHECK(error == 0, "cuLaunchKernel answered with error ", error);
  }

 private:
  static void use_device(int device) {
    static const auto context_of = symbol<int (*)(void**, int)>("libcuda.so.1", "cuDevicePrimaryCtxRetain");
    static const auto use = symbol<int (*)(void*)>("libcuda.so.1", "cuCtxSetCurrent");
    void* context = nullptr;
    int error = context_of(&context, device);
    if (error == 0) error = use(context);
    TORCH_CHECK(error == 0, "the driver does not let this thread use GPU ", device, ": error ", error);
  }
};

// --------------------------------------------------------------------------------------------------------------- steps

enum Step : int64_t { SQUARE_SUMS, FORWARD, BACKWARD, BACKWARD_SUMS, BACKWARD_APPLY };

Tensor empty(const Sizes& sizes, const Tensor& like, at::ScalarType dtype) {
  return at::empty(sizes, like.options().dtype(dtype));
}

// A norm's constants, and the kernels that it has launched. It is never deleted: graphs point to it.
class Norm {
 public:
  // `spec` is spec.NormSpec, `ranks` collectives.ProcessGroupInfo; the functions are host.py's, for first calls.
  Norm(py::object spec, py::object ranks, Sizes replicas, py::object fill_sums, py::object fill_outputs,
       py::object fill_gradients)
      : replicas(std::move(replicas)),
        size(ranks.attr("size").cast<int64_t>()),
        rank(ranks.attr("rank").cast<int64_t>()),
        group(ranks.attr("name").cast<std::string>()),
        spec(spec),
        terms(spec.attr("terms").cast<Sizes>()),
        eps(spec.attr("eps").cast<double>()),
        head_dim(spec.attr("head_dim").cast<int64_t>()),
        split(spec.attr("split").cast<Sizes>()),
        fill_sums(std::move(fill_sums)),
        fill_outputs(std::move(fill_outputs)),
        fill_gradients(std::move(fill_gradients)) {}

  Tensor square_sums(const Tensors& inputs) {
    Tensor sums = empty_sums(inputs);
    if (sums.numel()) {
      Arguments arguments(SQUARE_SUMS, sums.device());
      arguments.free(tokens(sums));
      parts(inputs, terms.size(), arguments);
      arguments.tensor(sums);
      arguments.integer(sums.size(2));
      auto* kernels = known_or_kept(arguments, [&] { return fill_sums(inputs, spec, sums); });
      if (kernels) kernels->front().launch(tokens(sums), arguments);
    }
    return sums;
  }

  // y of each part and, at the end, r.
  Tensors forward(const Tensors& inputs, const Tensors& weights, const MaybeTensor& sums, const MaybeTensor& cos,
                  const MaybeTensor& sin) {
    const Tensor& x = inputs.front();
    auto dtype = at::promote_types(x.scalar_type(), weights.front().scalar_type());
    Sizes heads;
    if (split.empty()) {
      for (const Tensor& input : inputs) heads.push_back(input.size(2));
    } else {
      heads = {x.size(2) * split[1], x.size(2), x.size(2)};
    }
    Tensors ys;
    for (int64_t n : heads) ys.push_back(empty({x.size(0), x.size(1), n, head_dim}, x, dtype));
    Tensor rstd = empty_sums(inputs);
    if (rstd.numel()) {
      Arguments arguments(FORWARD, x.device());
      arguments.free(tokens(rstd));
      parts(inputs, heads.size(), arguments);
      for (const Tensor& y : ys) arguments.view(y);
      for (const Tensor& weight : weights) arguments.tensor(weight);
      arguments.maybe(sums);
      arguments.tensor(rstd);
      table_and_terms(cos, sin, rstd, arguments);
      arguments.real(eps);
      auto* kernels = known_or_kept(
          arguments, [&] { return fill_outputs(inputs, weights, sums, cos, sin, spec, ys, rstd); });
      if (kernels) kernels->front().launch(tokens(rstd), arguments);
    }
    ys.push_back(rstd);
    return ys;
  }

  // Fill `dxs` and `dw`, as far as they are asked for; without `dxs` fill `coupling`, and without `dw` read it.
  void gradients(Step step, Tensors grads, const Tensors& inputs, const Tensors& weights, const Tensor& rstd,
                 const MaybeTensor& cos, const MaybeTensor& sin, const std::optional<Tensors>& dxs,
                 const MaybeTensor& dw, const MaybeTensor& coupling) {
    if (!rstd.numel()) {
      if (dw) dw->zero_();
      return;
    }
    for (Tensor& grad : grads) grad = dense(grad);
    size_t count = dxs ? grads.size() : terms.size();
    Arguments arguments(step, rstd.device());
    arguments.free(tokens(rstd));
    for (size_t part = 0; part < count; ++part) arguments.view(grads[part]);
    parts(inputs, count, arguments);
    dxs ? parts(*dxs, count, arguments) : arguments.none();
    for (const Tensor& weight : weights) arguments.tensor(weight);
    size_t place_of_partials = arguments.values.size();
    arguments.none();
    arguments.tensor(rstd);
    arguments.maybe(coupling);
    table_and_terms(cos, sin, rstd, arguments);
    if (dw) arguments.kind.push_back(static_cast<int64_t>(dw->scalar_type()));
    auto* kernels = known_or_kept(arguments, [&] {
      return fill_gradients(grads, py::make_tuple(inputs, weights, rstd, cos, sin), spec,
                            py::make_tuple(dxs, dw, coupling));
    });
    if (!kernels) return;
    if (!dw) return kernels->front().launch(tokens(rstd), arguments);
    int64_t programs = std::min(tokens(rstd), kernels->front().programs);
    Tensor partials = empty({programs, dw->numel()}, rstd, at::kFloat);
    arguments.values[place_of_partials] = reinterpret_cast<uint64_t>(partials.const_data_ptr());
    kernels->front().launch(programs, arguments);
    Arguments addition(step, rstd.device());
    addition.free(programs);
    addition.tensor(partials);
    addition.tensor(*dw);
    kernels->back().launch(kernels->back().programs, addition);
  }

  Tensor empty_sums(const Tensors& inputs) const {
    const Tensor& x = inputs.front();
    return empty({static_cast<int64_t>(terms.size()), x.size(0), x.size(1)}, x, at::kFloat);
  }

  // Empty; zeros where other ranks own some of a group's query heads, whose gradients no kernel writes here.
  Tensors empty_gradients(const Tensors& inputs) const {
    Tensors dxs;
    for (const Tensor& x : inputs) {
      bool owns_all = split.empty() || (split[1] + 2) * head_dim == x.size(3);
      dxs.push_back(owns_all ? at::empty(x.sizes(), x.options()) : at::zeros(x.sizes(), x.options()));
    }
    return dxs;
  }

  static Tensor dense(const Tensor& x) {
    return x.stride(-1) == 1 ? x : x.contiguous();
  }

  const Sizes replicas;
  const int64_t size, rank;
  const std::string group;

 private:
  static int64_t tokens(const Tensor& sums) {
    return sums.size(1) * sums.size(2);
  }

  // The first `count` of spec.parts_of.
  void parts(const Tensors& inputs, size_t count, Arguments& arguments) const {
    const Tensor& x = inputs.front();
    Sizes offsets(count);
    if (!split.empty()) {
      Sizes all{split[0] * head_dim, x.size(3) - 2 * head_dim, x.size(3) - head_dim};
      std::copy_n(all.begin(), count, offsets.begin());
    }
    for (size_t part = 0; part < count; ++part) arguments.view(split.empty() ? inputs[part] : x, offsets[part]);
    arguments.kind.push_back(x.size(3));
    for (const Tensor& input : inputs) arguments.kind.push_back(input.size(2));
  }

  // And, between the two, the batch size.
  void table_and_terms(const MaybeTensor& cos, const MaybeTensor& sin, const Tensor& rstd, Arguments& arguments) const {
    if (cos) {
      arguments.tensor(*cos);
      arguments.tensor(*sin);
      arguments.integer(cos->stride(0));
      arguments.integer(cos->dim() == 3 ? cos->stride(1) : 0);
      arguments.kind.push_back(cos->size(-1));
    } else {
      arguments.none();
    }
    arguments.integer(rstd.size(2));
    arguments.integer(terms.front());
    arguments.integer(terms.back());
  }

  // The kernels for these arguments; nullptr after the first call of their kind, in which `fill` has launched them.
  template <typename Fill>
  const std::vector<Kernel>* known_or_kept(const Arguments& arguments, Fill fill) {
    {
      std::lock_guard lock(mutex);
      auto found = kernels.find(arguments.kind);
      if (found != kernels.end()) return &found->second;
    }
    py::gil_scoped_acquire python;
    keep(arguments, fill());
    return nullptr;
  }

  // `launched`: None, or a list of host.Relaunch, the first with these arguments.
  void keep(const Arguments& arguments, const py::object& launched) {
    if (launched.is_none()) return;
    std::vector<Kernel> made;
    for (const py::handle& one : launched) {
      auto function = reinterpret_cast<void*>(one.attr("function").cast<uint64_t>());
      made.push_back({one.attr("compiled"), function, one.attr("warps").cast<unsigned>(),
                      one.attr("shared").cast<unsigned>(), one.attr("taken").cast<Sizes>(),
                      one.attr("programs").cast<int64_t>()});
    }
    auto values = launched[py::int_(0)].attr("values").cast<std::vector<std::optional<uint64_t>>>();
    TORCH_INTERNAL_ASSERT(values.size() == arguments.values.size());
    for (int64_t place : made.front().taken) {
      auto here = arguments.values[place];  // 0: the partials, which each call allocates
      TORCH_INTERNAL_ASSERT(!here || here == values[place], "argument ", place, " is another in Python");
    }
    std::lock_guard lock(mutex);
    kernels.emplace(arguments.kind, std::move(made));
  }

  const py::object spec;
  const Sizes terms;
  const double eps;
  const int64_t head_dim;
  const Sizes split;
  const py::object fill_sums, fill_outputs, fill_gradients;
  std::map<Sizes, std::vector<Kernel>> kernels;  // grows only: what was found stays where it is
  std::mutex mutex;
};

// ------------------------------------------------------------------------------------------------ the autograd function

Tensor sum_over_ranks(Tensor x, const Norm& norm) {
  Tensors tensors{x};
  c10d::AllreduceOptions options;
  options.asyncOp = false;  // on the current stream
  auto work = c10d::resolve_process_group(norm.group)->allreduce(tensors, options);
  if (work) work->wait();
  return x;
}

Tensors split_weights(const Tensor& dw, const Tensors& weights) {
  Tensors dws;
  int64_t start = 0;
  for (const Tensor& weight : weights) {
    dws.push_back(dw.narrow(0, start, weight.numel()));
    start += weight.numel();
  }
  return dws;
}

// function._summed: returns C summed over all ranks, and puts into `dws` the sums over those that hold the same heads.
Tensor summed(const Tensor& coupling, Tensors& dws, const Norm& norm) {
  if (*std::max_element(norm.replicas.begin(), norm.replicas.end()) == 1) return sum_over_ranks(coupling, norm);
  Tensors buffer{coupling.flatten()};
  for (size_t part = 0; part < dws.size(); ++part) {
    int64_t r = norm.replicas[part], before = norm.rank / r, length = dws[part].numel();
    if (r > 1) {
      buffer.push_back(at::constant_pad_nd(dws[part], {before * length, (norm.size / r - before - 1) * length}));
    }
  }
  Tensor total = sum_over_ranks(at::cat(buffer), norm);
  int64_t start = coupling.numel();
  for (size_t part = 0; part < dws.size(); ++part) {
    int64_t r = norm.replicas[part], length = dws[part].numel();
    if (r > 1) {
      dws[part] = total.narrow(0, start + norm.rank / r * length, length);
      start += norm.size / r * length;
    }
  }
  return total.narrow(0, 0, coupling.numel()).view(coupling.sizes());
}

class HeadNorm : public torch::autograd::Function<HeadNorm> {
 public:
  static Tensors forward(torch::autograd::AutogradContext* context, int64_t self, MaybeTensor cos, MaybeTensor sin,
                         at::TensorList weights, at::TensorList inputs) {
    Norm& norm = *reinterpret_cast<Norm*>(self);
    if (cos) cos = cos->contiguous(), sin = sin->contiguous();
    Tensors all{cos.value_or(Tensor()), sin.value_or(Tensor())}, xs;
    for (const Tensor& input : inputs) xs.push_back(Norm::dense(input));
    MaybeTensor sums;
    if (norm.size > 1) sums = sum_over_ranks(norm.square_sums(xs), norm);
    Tensors outputs = norm.forward(xs, weights.vec(), sums, cos, sin);
    all.push_back(outputs.back());
    outputs.pop_back();
    all.insert(all.end(), weights.begin(), weights.end());
    all.insert(all.end(), inputs.begin(), inputs.end());
    context->save_for_backward(std::move(all));
    context->saved_data["self"] = self;
    return outputs;
  }

  static Tensors backward(torch::autograd::AutogradContext* context, Tensors grads) {
    Norm& norm = *reinterpret_cast<Norm*>(context->saved_data["self"].toInt());
    Tensors saved = context->get_saved_variables();
    bool wants_graph = at::GradMode::is_enabled();
    at::AutoGradMode graph(false);
    c10::DeviceGuard device(saved[2].device());
    MaybeTensor cos, sin;
    if (saved[0].defined()) cos = saved[0], sin = saved[1];
    const Tensor& rstd = saved[2];
    Tensors weights(saved.begin() + 3, saved.begin() + 3 + norm.replicas.size()), inputs;
    for (size_t i = 3 + weights.size(); i < saved.size(); ++i) inputs.push_back(Norm::dense(saved[i]));
    int64_t width = 0;
    for (const Tensor& weight : weights) width += weight.numel();
    Tensors dxs, dws;
    if (norm.size == 1) {
      dxs = norm.empty_gradients(inputs);
      Tensor dw = empty({width}, rstd, weights.front().scalar_type());
      norm.gradients(BACKWARD, grads, inputs, weights, rstd, cos, sin, dxs, dw, {});
      dws = split_weights(dw, weights);
    } else {
      Tensor coupling = norm.empty_sums(inputs), dw = empty({width}, rstd, at::kFloat);
      norm.gradients(BACKWARD_SUMS, grads, inputs, weights, rstd, cos, sin, {}, dw, coupling);
      dws = split_weights(dw, weights);
      coupling = summed(coupling, dws, norm);
      dxs = norm.empty_gradients(inputs);
      norm.gradients(BACKWARD_APPLY, grads, inputs, weights, rstd, cos, sin, dxs, {}, coupling);
    }
    for (size_t part = 0; part < dws.size(); ++part) dws[part] = dws[part].to(weights[part].scalar_type());
    dws.insert(dws.end(), dxs.begin(), dxs.end());
    if (wants_graph) dws = not_differentiable(std::move(dws));
    dws.insert(dws.begin(), 3, Tensor());  // none for the norm, cos and sin
    return dws;
  }

 private:
  // Differentiating these is an error and does not silently give no gradient; unlike with once_differentiable, also if
  // the incoming gradients have no graph.
  static Tensors not_differentiable(Tensors grads) {
    auto error = std::make_shared<torch::autograd::DelayedError>(
        "the norm's backward pass cannot be differentiated: leave out create_graph=True", grads.size());
    for (Tensor& grad : grads) grad = grad.detach().set_requires_grad(true);
    return (*error)(std::move(grads));
  }
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  py::class_<Norm, std::unique_ptr<Norm, py::nodelete>>(module, "Norm")
      .def(py::init<py::object, py::object, Sizes, py::object, py::object, py::object>())
      .def("__call__", [](Norm& self, const MaybeTensor& cos, const MaybeTensor& sin, const Tensors& weights,
                          const Tensors& inputs) {
        py::gil_scoped_release no_python;
        c10::DeviceGuard device(inputs.front().device());
        auto pointer = reinterpret_cast<int64_t>(&self);
        return HeadNorm::apply(pointer, cos, sin, at::TensorList(weights), at::TensorList(inputs));
      });
}
