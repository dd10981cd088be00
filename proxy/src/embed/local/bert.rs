//! The forward pass of BERT. Texts of any lengths go through the layers as one matrix with a row for each token; only
//! attention looks at them one by one. So nothing is padded, and nothing has to be masked.

use std::ops::Range;

use ndarray::{Array1, Array2, ArrayView2, Axis, Zip, linalg::general_mat_mul, s};
use safetensors::{Dtype, SafeTensors};

use super::files::{Config, Pooling};

/// A model's weights.
pub(super) struct Bert {
    words: Array2<f32>,
    /// With the one token type that there is already in them.
    positions: Array2<f32>,
    norm: Norm,
    layers: Vec<Layer>,
    pooling: Pooling,
}

struct Layer {
    heads: usize,
    query: Linear,
    key: Linear,
    value: Linear,
    attended: Linear,
    attended_norm: Norm,
    intermediate: Linear,
    activation: Activation,
    output: Linear,
    output_norm: Norm,
}

#[derive(Clone, Copy)]
enum Activation {
    Gelu,
    GeluTanh,
    Relu,
}

/// `x · weightᵀ + bias`
struct Linear {
    weight: Array2<f32>,
    bias: Array1<f32>,
}

struct Norm {
    weight: Array1<f32>,
    bias: Array1<f32>,
    epsilon: f32,
}

impl Bert {
    /// Reads a model; the error says what is not as it has to be.
    pub(super) fn read(config: &Config, pooling: Pooling, weights: &[u8]) -> Result<Self, String> {
        if config.model_type != "bert" {
            return Err(format!("its model_type is {} and not bert", config.model_type));
        }
        if config.position_embedding_type.as_deref().unwrap_or("absolute") != "absolute" {
            return Err("its position_embedding_type is not absolute".to_owned());
        }
        let activation = match config.hidden_act.as_str() {
            "gelu" => Activation::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            other => return Err(format!("its hidden_act {other} is not known")),
        };
        let tensors = SafeTensors::deserialize(weights).map_err(|error| format!("model.safetensors: {error}"))?;
        let weights = Weights::new(&tensors, config);
        let words = weights.matrix("embeddings.word_embeddings.weight")?;
        let hidden = words.ncols();
        let types = weights.matrix("embeddings.token_type_embeddings.weight")?;
        let positions = weights.matrix("embeddings.position_embeddings.weight")?;
        if config.num_attention_heads == 0 || hidden % config.num_attention_heads != 0 {
            return Err(format!(
                "{} heads do not share {hidden} numbers",
                config.num_attention_heads
            ));
        }
        if types.is_empty() || types.ncols() != hidden || positions.dim() != (config.max_position_embeddings, hidden) {
            return Err("the parts of model.safetensors do not fit each other".to_owned());
        }
        let layers = (0..config.num_hidden_layers).map(|number| weights.layer(number, hidden, activation));
        Ok(Self {
            positions: positions + types.row(0),
            norm: weights.norm("embeddings.LayerNorm", hidden)?,
            layers: layers.collect::<Result<_, _>>()?,
            words,
            pooling,
        })
    }

    pub(super) fn dimensions(&self) -> usize {
        self.words.ncols()
    }

    pub(super) fn vocabulary(&self) -> usize {
        self.words.nrows()
    }

    /// A vector for each text, given as its tokens, of which there are some.
    pub(super) fn embed(&self, texts: &[Vec<u32>]) -> Vec<Vec<f32>> {
        let mut end = 0;
        let spans: Vec<Range<usize>> = texts
            .iter()
            .map(|text| {
                let begin = end;
                end += text.len();
                begin..end
            })
            .collect();
        let mut x = Array2::zeros((end, self.dimensions()));
        for (text, span) in texts.iter().zip(&spans) {
            for ((token, row), position) in text.iter().zip(span.clone()).zip(self.positions.rows()) {
                let word = self.words.row(*token as usize);
                x.row_mut(row).assign(&(&word + &position));
            }
        }
        self.norm.apply(&mut x);
        for layer in &self.layers {
            layer.apply(&mut x, &spans);
        }
        let pooled = spans.into_iter().map(|span| {
            let tokens = x.slice(s![span, ..]);
            match self.pooling {
                // Its length is of no matter.
                Pooling::Mean => tokens.sum_axis(Axis(0)).to_vec(),
                Pooling::First => tokens.row(0).to_vec(),
            }
        });
        pooled.collect()
    }
}

impl Layer {
    fn apply(&self, x: &mut Array2<f32>, spans: &[Range<usize>]) {
        let (query, key, value) = (self.query.of(x), self.key.of(x), self.value.of(x));
        let mut context = Array2::zeros(x.dim());
        for span in spans {
            for columns in columns(x.ncols(), self.heads) {
                let part = s![span.clone(), columns];
                let (query, key, value) = (query.slice(part), key.slice(part), value.slice(part));
                let weights = attention(&query, &key);
                general_mat_mul(1.0, &weights, &value, 0.0, &mut context.slice_mut(part));
            }
        }
        *x += &self.attended.of(&context);
        self.attended_norm.apply(x);
        let mut inner = self.intermediate.of(x);
        // Each by its name, so that it becomes part of its loop.
        match self.activation {
            Activation::Gelu => inner.mapv_inplace(gelu),
            Activation::GeluTanh => inner.mapv_inplace(gelu_tanh),
            Activation::Relu => inner.mapv_inplace(|x| x.max(0.0)),
        }
        *x += &self.output.of(&inner);
        self.output_norm.apply(x);
    }
}

/// The columns of each head.
fn columns(all: usize, heads: usize) -> impl Iterator<Item = Range<usize>> {
    let each = all / heads;
    (0..heads).map(move |head| head * each..(head + 1) * each)
}

/// How much each token attends to each: `softmax(query · keyᵀ / √size)`.
fn attention(query: &ArrayView2<f32>, key: &ArrayView2<f32>) -> Array2<f32> {
    let mut weights = query.dot(&key.t());
    #[expect(clippy::cast_precision_loss, reason = "a few hundred at most")]
    let scale = (query.ncols() as f32).sqrt().recip();
    for mut row in weights.rows_mut() {
        let highest = row.fold(f32::NEG_INFINITY, |highest, x| highest.max(*x));
        row.mapv_inplace(|x| ((x - highest) * scale).exp());
        let sum = row.sum();
        row.mapv_inplace(|x| x / sum);
    }
    weights
}

impl Linear {
    fn of(&self, x: &Array2<f32>) -> Array2<f32> {
        let mut y = x.dot(&self.weight.t());
        y += &self.bias;
        y
    }
}

impl Norm {
    fn apply(&self, x: &mut Array2<f32>) {
        #[expect(clippy::cast_precision_loss, reason = "a few thousand at most")]
        let count = x.ncols() as f32;
        for mut row in x.rows_mut() {
            let mean = row.sum() / count;
            row -= mean;
            let variance = row.fold(0.0, |sum, x| sum + x * x) / count;
            let scale = (variance + self.epsilon).sqrt().recip();
            Zip::from(&mut row)
                .and(&self.weight)
                .and(&self.bias)
                .for_each(|x, weight, bias| *x = *x * scale * weight + bias);
        }
    }
}

fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

fn gelu_tanh(x: f32) -> f32 {
    let inner = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
    0.5 * x * (1.0 + inner.tanh())
}

/// The error function as a quotient of two polynomials, those of Eigen, with an error below 4e-7: without a branch or a
/// call, so that a whole row is worked on at once.
fn erf(x: f32) -> f32 {
    const ABOVE: [f32; 7] = [
        -2.726_142_3e-10,
        2.770_681_4e-8,
        -2.101_024e-6,
        -5.692_506_4e-5,
        -7.349_906_3e-4,
        -2.954_6e-3,
        -1.609_603_3e-2,
    ];
    const BELOW: [f32; 5] = [
        -1.456_607_2e-5,
        -2.133_740_5e-4,
        -1.682_827e-3,
        -7.373_329e-3,
        -1.426_473_9e-2,
    ];
    let x = x.clamp(-4.0, 4.0);
    let square = x * x;
    let polynomial = |coefficients: &[f32]| coefficients.iter().fold(0.0, |sum, c| sum * square + c);
    x * polynomial(&ABOVE) / polynomial(&BELOW)
}

/// The tensors of a file by their names, which some publish below `bert.`.
struct Weights<'a> {
    tensors: &'a SafeTensors<'a>,
    prefix: &'static str,
    heads: usize,
    epsilon: f32,
}

impl<'a> Weights<'a> {
    fn new(tensors: &'a SafeTensors<'a>, config: &Config) -> Self {
        let below_bert = tensors.tensor("bert.embeddings.word_embeddings.weight").is_ok();
        Self {
            tensors,
            prefix: if below_bert { "bert." } else { "" },
            heads: config.num_attention_heads,
            epsilon: config.layer_norm_eps,
        }
    }

    fn numbers(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), String> {
        let name = format!("{}{name}", self.prefix);
        let tensor = self
            .tensors
            .tensor(&name)
            .map_err(|_| format!("model.safetensors has no {name}"))?;
        if tensor.dtype() != Dtype::F32 {
            return Err(format!("{name} is of {:?} and not of F32", tensor.dtype()));
        }
        let numbers = tensor
            .data()
            .as_chunks::<4>()
            .0
            .iter()
            .map(|bytes| f32::from_le_bytes(*bytes));
        Ok((tensor.shape().to_vec(), numbers.collect()))
    }

    fn matrix(&self, name: &str) -> Result<Array2<f32>, String> {
        match self.numbers(name)? {
            (shape, numbers) if shape.len() == 2 => {
                Array2::from_shape_vec((shape[0], shape[1]), numbers).map_err(|error| format!("{name}: {error}"))
            }
            _ => Err(format!("{name} is no matrix")),
        }
    }

    fn vector(&self, name: &str, length: usize) -> Result<Array1<f32>, String> {
        let (shape, numbers) = self.numbers(name)?;
        if shape == [length] {
            Ok(numbers.into())
        } else {
            Err(format!("{name} has the shape {shape:?} and not [{length}]"))
        }
    }

    fn linear(&self, name: &str, inputs: usize, outputs: usize) -> Result<Linear, String> {
        let weight = self.matrix(&format!("{name}.weight"))?;
        if weight.dim() != (outputs, inputs) {
            return Err(format!(
                "{name} has the shape {:?} and not {:?}",
                weight.dim(),
                (outputs, inputs)
            ));
        }
        Ok(Linear {
            weight,
            bias: self.vector(&format!("{name}.bias"), outputs)?,
        })
    }

    fn norm(&self, name: &str, hidden: usize) -> Result<Norm, String> {
        Ok(Norm {
            weight: self.vector(&format!("{name}.weight"), hidden)?,
            bias: self.vector(&format!("{name}.bias"), hidden)?,
            epsilon: self.epsilon,
        })
    }

    fn layer(&self, number: usize, hidden: usize, activation: Activation) -> Result<Layer, String> {
        let name = |part: &str| format!("encoder.layer.{number}.{part}");
        let inner = self.matrix(&name("intermediate.dense.weight"))?.nrows();
        Ok(Layer {
            heads: self.heads,
            query: self.linear(&name("attention.self.query"), hidden, hidden)?,
            key: self.linear(&name("attention.self.key"), hidden, hidden)?,
            value: self.linear(&name("attention.self.value"), hidden, hidden)?,
            attended: self.linear(&name("attention.output.dense"), hidden, hidden)?,
            attended_norm: self.norm(&name("attention.output.LayerNorm"), hidden)?,
            intermediate: self.linear(&name("intermediate.dense"), hidden, inner)?,
            activation,
            output: self.linear(&name("output.dense"), inner, hidden)?,
            output_norm: self.norm(&name("output.LayerNorm"), hidden)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::erf;

    #[test]
    fn the_error_function_is_as_tables_have_it() {
        // Abramowitz and Stegun, table 7.1.
        for (x, expected) in [
            (0.0, 0.0),
            (0.1, 0.112_462_9),
            (0.5, 0.520_499_9),
            (1.0, 0.842_700_8),
            (2.0, 0.995_322_3),
        ] {
            for sign in [1.0, -1.0] {
                let error = erf(sign * x) - sign * expected;
                assert!(error.abs() < 5e-7, "erf({x}) is {error} off");
            }
        }
        assert!((erf(50.0) - 1.0).abs() < 5e-7);
    }
}
