"""The Inception graph of 2015-12-05 with random weights: the names, shapes and operations of the
published one, of full width or a fraction of it, in the archive that it comes in."""

import io
import tarfile

import numpy as np
import tensorflow as tf

MEMBER = "classify_image_graph_def.pb"
FIRST = (("conv", 3, 2, 32), ("conv_1", 3, 1, 32), ("conv_2", 3, 1, 64), ("pool", 3, 2, 0))
SECOND = (("conv_3", 1, 1, 80), ("conv_4", 3, 1, 192), ("pool_1", 3, 2, 0))


class Builder:
    """Writes the nodes one by one, as an old GraphDef: its batch normalisation is gone since."""

    def __init__(self, width):
        self.graph, self.width = tf.compat.v1.GraphDef(), width
        self.graph.versions.producer = 8
        self.random = np.random.default_rng(0)

    def add(self, name, op, *inputs, batch_of_one=None, **attributes):
        node = self.graph.node.add(name=name, op=op, input=inputs)
        if op not in ("Const", "DecodeJpeg", "Cast"):
            node.attr["T"].type = tf.float32.as_datatype_enum
        for key, value in attributes.items():
            if isinstance(value, str):
                node.attr[key].s = value.encode()
            elif isinstance(value, list):
                node.attr[key].list.i.extend(value)
            elif isinstance(value, float):
                node.attr[key].f = value
            elif isinstance(value, bool):
                node.attr[key].b = value
            elif isinstance(value, int):
                node.attr[key].i = value
            else:
                node.attr[key].type = value.as_datatype_enum
        if batch_of_one:  # as the published graph's nodes say of themselves
            shape = node.attr["_output_shapes"].list.shape.add()
            for size in (1, *batch_of_one):
                shape.dim.add(size=size)
        return name

    def constant(self, name, value):
        node = self.graph.node.add(name=name, op="Const")
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
        node.attr["dtype"].type = tf.as_dtype(np.asarray(value).dtype).as_datatype_enum
        return name

    def channels(self, full):
        return max(1, round(full * self.width))

    def convolution(self, hidden, name, size, filters, stride=1, padding="SAME", full=False):
        hidden, channels = hidden
        filters = filters if full else self.channels(filters)
        height, width = (size, size) if isinstance(size, int) else size
        spread = np.sqrt(2 / (height * width * channels))
        kernel = self.random.normal(scale=spread, size=(height, width, channels, filters))
        kernel = self.constant(f"{name}/conv2d_params", kernel.astype(np.float32))
        strides = [1, stride, stride, 1]
        inner = self.add(
            f"{name}/Conv2D", "Conv2D", hidden, kernel, strides=strides, padding=padding
        )
        parts = [
            self.constant(f"{name}/batchnorm/{part}", np.full(filters, value, np.float32))
            for part, value in (
                ("moving_mean", 0),
                ("moving_variance", 1),
                ("beta", 0),
                ("gamma", 1),
            )
        ]
        inner = self.add(
            f"{name}/batchnorm",
            "BatchNormWithGlobalNormalization",
            inner,
            *parts,
            variance_epsilon=0.001,
            scale_after_normalization=False,
        )
        check = self.add(f"{name}/CheckNumerics", "CheckNumerics", inner, message="not finite")
        inner = self.add(f"{name}/control_dependency", "Identity", inner, f"^{check}")
        return self.add(name, "Relu", inner), filters

    def pool(self, hidden, name, kind="MaxPool", size=3, stride=1, padding="SAME"):
        windows = {"ksize": [1, size, size, 1], "strides": [1, stride, stride, 1]}
        return self.add(name, kind, hidden[0], **windows, padding=padding), hidden[1]

    def join(self, name, *branches):
        axis = self.constant(f"{name}/concat_dim", np.int32(3))
        names = [branch for branch, _ in branches]
        return self.add(name, "Concat", axis, *names, N=len(names)), sum(n for _, n in branches)

    def chain(self, hidden, name, *steps):
        for number, (size, filters) in enumerate(steps):
            hidden = self.convolution(hidden, f"{name}/conv_{number}", size, filters)
        return hidden


def build_graph(width=1.0):
    """Return the GraphDef; `width` scales the layers, but the last ones stay 2048 and 1008."""
    b = Builder(width)
    b.constant("DecodeJpeg/contents", np.array(b"", dtype=object))
    b.add("DecodeJpeg", "DecodeJpeg", "DecodeJpeg/contents", channels=3)
    b.add("Cast", "Cast", "DecodeJpeg", SrcT=tf.uint8, DstT=tf.float32)
    b.constant("ExpandDims/dim", np.int32(0))
    b.add("ExpandDims", "ExpandDims", "Cast", "ExpandDims/dim")
    b.constant("ResizeBilinear/size", np.array([299, 299], np.int32))
    b.add("ResizeBilinear", "ResizeBilinear", "ExpandDims", "ResizeBilinear/size")
    b.constant("Sub/y", np.float32(128))
    b.add("Sub", "Sub", "ResizeBilinear", "Sub/y", batch_of_one=(299, 299, 3))
    b.constant("Mul/y", np.float32(0.0078125))
    hidden = b.add("Mul", "Mul", "Sub", "Mul/y", batch_of_one=(299, 299, 3)), 3
    for name, size, stride, filters in (*FIRST, *SECOND):
        padding = "SAME" if name == "conv_2" else "VALID"
        if filters:
            hidden = b.convolution(hidden, name, size, filters, stride, padding)
        else:
            hidden = b.pool(hidden, name, "MaxPool", size, stride, padding)
    for number, pooled in enumerate((32, 64, 64)):
        name = f"mixed_{number}" if number else "mixed"
        hidden = b.join(
            name,
            b.chain(hidden, f"{name}/one", (1, 64)),
            b.chain(hidden, f"{name}/tower", (1, 48), (5, 64)),
            b.chain(hidden, f"{name}/tower_1", (1, 64), (3, 96), (3, 96)),
            b.chain(b.pool(hidden, f"{name}/pool", "AvgPool"), f"{name}/tower_2", (1, pooled)),
        )
    tower = b.chain(hidden, "mixed_3/tower", (1, 64), (3, 96))
    hidden = b.join(
        "mixed_3",
        b.convolution(hidden, "mixed_3/conv", 3, 384, 2, "VALID"),
        b.convolution(tower, "mixed_3/tower/conv_2", 3, 96, 2, "VALID"),
        b.pool(hidden, "mixed_3/pool", "MaxPool", 3, 2, "VALID"),
    )
    flat, tall = (1, 7), (7, 1)
    for number, inner in enumerate((128, 160, 160, 192), 4):
        name = f"mixed_{number}"
        long = ((1, inner), (tall, inner), (flat, inner), (tall, inner), (flat, 192))
        hidden = b.join(
            name,
            b.chain(hidden, f"{name}/one", (1, 192)),
            b.chain(hidden, f"{name}/tower", (1, inner), (flat, inner), (tall, 192)),
            b.chain(hidden, f"{name}/tower_1", *long),
            b.chain(b.pool(hidden, f"{name}/pool", "AvgPool"), f"{name}/tower_2", (1, 192)),
        )
    towers = (
        b.chain(hidden, "mixed_8/tower", (1, 192)),
        b.chain(hidden, "mixed_8/tower_1", (1, 192), (flat, 192), (tall, 192)),
    )
    hidden = b.join(
        "mixed_8",
        b.convolution(towers[0], "mixed_8/tower/conv_1", 3, 320, 2, "VALID"),
        b.convolution(towers[1], "mixed_8/tower_1/conv_3", 3, 192, 2, "VALID"),
        b.pool(hidden, "mixed_8/pool", "MaxPool", 3, 2, "VALID"),
    )
    for number, kind in ((9, "AvgPool"), (10, "MaxPool")):
        name, thin = f"mixed_{number}", number == 10  # the last one's sum is 2,048 at any width
        towers = (
            b.chain(hidden, f"{name}/tower", (1, 384)),
            b.chain(hidden, f"{name}/tower_1", (1, 448), (3, 384)),
        )
        branches = [
            (hidden, "conv", 1, 320),
            (towers[0], "tower/mixed/conv", (1, 3), 384),
            (towers[0], "tower/mixed/conv_1", (3, 1), 384),
            (towers[1], "tower_1/mixed/conv", (1, 3), 384),
            (towers[1], "tower_1/mixed/conv_1", (3, 1), 384),
            (b.pool(hidden, f"{name}/pool", kind), "tower_2/conv", 1, 192),
        ]
        hidden = b.join(
            f"{name}/join" if thin else name,
            *(b.convolution(x, f"{name}/{n}", size, f, full=thin) for x, n, size, f in branches),
        )
    hidden, _ = b.pool(hidden, "pool_3", "AvgPool", 8, 1, "VALID")
    b.graph.node[-1].attr["_output_shapes"].list.shape.add()
    for size in (1, 1, 1, 2048):
        b.graph.node[-1].attr["_output_shapes"].list.shape[0].dim.add(size=size)
    b.constant("pool_3/_reshape/shape", np.array([1, 2048], np.int32))
    b.add("pool_3/_reshape", "Reshape", hidden, "pool_3/_reshape/shape", batch_of_one=(2048,))
    weights = b.random.normal(scale=0.05, size=(2048, 1008)).astype(np.float32)
    b.constant("softmax/weights", weights)
    b.add("softmax/logits/MatMul", "MatMul", "pool_3/_reshape", "softmax/weights")
    b.constant("softmax/biases", b.random.normal(scale=9, size=1008).astype(np.float32))
    b.add("softmax/logits", "BiasAdd", "softmax/logits/MatMul", "softmax/biases")
    b.add("softmax", "Softmax", "softmax/logits", batch_of_one=(1008,))
    return b.graph


def archive_of(graph, name=MEMBER):
    """Return the bytes of a .tgz that holds the graph beside another file, as published."""
    file = io.BytesIO()
    content = graph if isinstance(graph, bytes) else graph.SerializeToString()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as archive:
        for member, data in (("LICENSE", b"as published\n"), (name, content)):
            header = tarfile.TarInfo(member)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return file.getvalue()
