//! The driver's requests as text.

use std::str::FromStr;

/// Most bytes in one `load` or `store`.
const MAX_LENGTH: usize = 64 * 1024;

/// One request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Command {
    In { port: u16, width: usize },
    Out { port: u16, data: Vec<u8> },
    Read { address: u64, width: usize },
    Write { address: u64, data: Vec<u8> },
    Load { address: u64, length: usize },
    Store { address: u64, data: Vec<u8> },
    Interrupts,
}

impl FromStr for Command {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["in", at, w] => Ok(Self::In {
                port: port(at)?,
                width: width(w, 4)?,
            }),
            ["out", at, w, value] => Ok(Self::Out {
                port: port(at)?,
                data: bytes(w, 4, value)?,
            }),
            ["read", at, w] => Ok(Self::Read {
                address: number(at)?,
                width: width(w, 8)?,
            }),
            ["write", at, w, value] => Ok(Self::Write {
                address: number(at)?,
                data: bytes(w, 8, value)?,
            }),
            ["load", at, length] => {
                let length = usize::try_from(number(length)?).unwrap_or(usize::MAX);
                if length > MAX_LENGTH {
                    return Err(format!("length {length} is over {MAX_LENGTH}"));
                }
                Ok(Self::Load {
                    address: number(at)?,
                    length,
                })
            }
            ["store", at, data] => Ok(Self::Store {
                address: number(at)?,
                data: hex(data)?,
            }),
            ["interrupts"] => Ok(Self::Interrupts),
            [] => Err("empty request".to_owned()),
            [verb, ..] => Err(format!(
                "`{verb}` with {} arguments; there are in, out, read, write, load, store and \
                 interrupts",
                words.len() - 1
            )),
        }
    }
}

fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("`{text}` is not a number"))
}

fn port(text: &str) -> Result<u16, String> {
    number(text)?
        .try_into()
        .map_err(|_| format!("port {text} is over 0xffff"))
}

fn width(text: &str, most: usize) -> Result<usize, String> {
    match number(text)? {
        n @ (1 | 2 | 4 | 8) if n <= most as u64 => Ok(n as usize),
        n => Err(format!(
            "width {n} is not 1, 2, 4{}",
            if most == 8 { " or 8" } else { "" }
        )),
    }
}

fn bytes(w: &str, most: usize, value: &str) -> Result<Vec<u8>, String> {
    Ok(number(value)?.to_le_bytes()[..width(w, most)?].to_vec())
}

fn hex(text: &str) -> Result<Vec<u8>, String> {
    let digit = |c: u8| char::from(c).to_digit(16).map(|d| d as u8);
    let data: Option<Vec<u8>> = text
        .as_bytes()
        .chunks(2)
        .map(|pair| match pair {
            [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
            _ => None,
        })
        .collect();
    match data {
        Some(data) if data.len() <= MAX_LENGTH => Ok(data),
        Some(_) => Err(format!("more than {MAX_LENGTH} bytes")),
        None => Err("not an even number of hexadecimal digits".to_owned()),
    }
}
