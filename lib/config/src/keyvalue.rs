//! The value of a command line option: `key=value,key=value,flag`.
//!
//! - A key without `=` is a flag and means `true`.
//! - The first item may be the bare value of the option's main key: `2,model=host`.
//! - A comma that belongs to a value is written twice: `path=a,,b.img`.
//! - Only the first `=` of an item separates; further ones belong to the value.

use std::fmt::Display;

use serde::de::value::StrDeserializer;
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Deserializer, Expected, MapAccess, Unexpected, Visitor,
};
use serde::forward_to_deserialize_any;
use thiserror::Error as ThisError;

/// What is wrong with a key=value list.
#[derive(Debug, Clone, PartialEq, Eq, ThisError)]
pub enum Error {
    /// Nothing stands before, between or after commas.
    #[error("an item is empty (a comma inside a value is written twice)")]
    EmptyItem,
    /// A key that the option does not have.
    #[error("unknown key `{key}`, allowed: {allowed}")]
    UnknownKey {
        /// The key found.
        key: String,
        /// The keys of the option.
        allowed: String,
    },
    /// A key that stands there twice.
    #[error("key `{0}` is given twice")]
    Duplicate(String),
    /// A value that its key does not allow.
    #[error("key `{key}`: found `{found}`, allowed: {allowed}")]
    Value {
        /// The key.
        key: String,
        /// The value found.
        found: String,
        /// What the key allows.
        allowed: String,
    },
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

impl de::Error for Error {
    fn custom<T: Display>(message: T) -> Self {
        Self::Other(message.to_string())
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::invalid_value(found, expected)
    }

    fn invalid_value(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::Value {
            key: String::new(),
            found: match found {
                Unexpected::Str(text) => text.to_owned(),
                Unexpected::Unsigned(number) => number.to_string(),
                Unexpected::Signed(number) => number.to_string(),
                Unexpected::Bool(value) => value.to_string(),
                other => other.to_string(),
            },
            allowed: expected.to_string(),
        }
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Self::UnknownKey {
            key: field.to_owned(),
            allowed: expected
                .iter()
                .map(|key| format!("`{key}`"))
                .collect::<Vec<_>>()
                .join(", "),
        }
    }

    fn duplicate_field(field: &'static str) -> Self {
        Self::Duplicate(field.to_owned())
    }
}

/// Reads `text` as a `T`. `main_key` is the key that a bare first value belongs to.
pub fn from_str<T: DeserializeOwned>(text: &str, main_key: Option<&str>) -> Result<T, Error> {
    T::deserialize(List {
        items: split(text, main_key)?.into_iter(),
        value: None,
    })
}

struct Item {
    key: String,
    value: Option<String>,
}

/// Cuts the text at single commas; a text without any character has no items.
fn split(text: &str, main_key: Option<&str>) -> Result<Vec<Item>, Error> {
    let mut items = Vec::new();
    if text.is_empty() {
        return Ok(items);
    }
    let mut raw = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            raw.push(String::new());
        } else if let Some(last) = raw.last_mut() {
            last.push(c);
        }
    }
    for (index, item) in raw.into_iter().enumerate() {
        if item.is_empty() {
            return Err(Error::EmptyItem);
        }
        items.push(match (item.split_once('='), main_key) {
            (Some((key, value)), _) => Item {
                key: key.to_owned(),
                value: Some(value.to_owned()),
            },
            (None, Some(key)) if index == 0 => Item {
                key: key.to_owned(),
                value: Some(item),
            },
            (None, _) => Item {
                key: item,
                value: None,
            },
        });
    }
    Ok(items)
}

struct List {
    items: std::vec::IntoIter<Item>,
    value: Option<Item>,
}

impl<'de> Deserializer<'de> for List {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_map(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option
        unit unit_struct newtype_struct seq tuple tuple_struct map struct enum identifier
        ignored_any
    }
}

impl<'de> MapAccess<'de> for List {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let Some(item) = self.items.next() else {
            return Ok(None);
        };
        let key = seed.deserialize(StrDeserializer::<Error>::new(&item.key))?;
        self.value = Some(item);
        Ok(Some(key))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let item = self
            .value
            .take()
            .ok_or_else(|| de::Error::custom("a value was asked for before its key"))?;
        let key = item.key;
        seed.deserialize(Text(item.value))
            .map_err(|error| match error {
                Error::Value { found, allowed, .. } => Error::Value {
                    key,
                    found,
                    allowed,
                },
                other => other,
            })
    }
}

/// One value; `None` for a flag.
struct Text(Option<String>);

impl Text {
    fn number<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0.as_deref().map(str::parse::<u64>) {
            Some(Ok(number)) => visitor.visit_u64(number),
            _ => self.deserialize_any(visitor),
        }
    }
}

impl<'de> Deserializer<'de> for Text {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Some(text) => visitor.visit_string(text),
            None => visitor.visit_bool(true),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0.as_deref() {
            None | Some("on" | "true") => visitor.visit_bool(true),
            Some("off" | "false") => visitor.visit_bool(false),
            Some(other) => Err(de::Error::invalid_value(
                Unexpected::Str(other),
                &"`on` or `off`",
            )),
        }
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.number(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u8 u16 u32 u128 f32 f64 char str string bytes byte_buf unit unit_struct
        seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cpus, Disk, Short};

    fn disk(text: &str) -> Result<Disk, Error> {
        Disk::from_text(text)
    }

    #[test]
    fn main_key_flags_and_escapes() {
        let got = disk("a.img,readonly,id=root,slot=9").unwrap();
        assert_eq!(got.path.unwrap().to_str(), Some("a.img"));
        assert!(got.readonly);
        assert_eq!(got.id.unwrap().as_str(), "root");
        let got = disk("path=a,,b=c.img,readonly=off").unwrap();
        assert_eq!(got.path.unwrap().to_str(), Some("a,b=c.img"));
        assert!(!got.readonly);
        // Three commas: one in the value, then one that separates.
        let got = disk("a,,,readonly").unwrap();
        assert_eq!(got.path.unwrap().to_str(), Some("a,"));
        assert!(got.readonly);
        assert_eq!(Cpus::from_text("").unwrap(), Cpus::default());
        assert_eq!(Cpus::from_text("4,model=host").unwrap().count.get(), 4);
    }

    #[test]
    fn errors_name_key_found_and_allowed() {
        for (text, message) in [
            (
                "path=a,queues=0",
                "key `queues`: found `0`, allowed: a whole number from 1 to 64",
            ),
            (
                "path=a,queues=many",
                "key `queues`: found `many`, allowed: a whole number from 1 to 64",
            ),
            (
                "path=a,queues",
                "key `queues`: found `true`, allowed: a whole number from 1 to 64",
            ),
            (
                "path=a,format=qcow2",
                "key `format`: found `qcow2`, allowed: `raw`",
            ),
            (
                "path=a,readonly=maybe",
                "key `readonly`: found `maybe`, allowed: `on` or `off`",
            ),
            ("path=a,path=b", "key `path` is given twice"),
            ("readonly,path=b", "key `path` is given twice"),
            (
                "path=a,",
                "an item is empty (a comma inside a value is written twice)",
            ),
            (
                "path=a,cache=none",
                "unknown key `cache`, allowed: `path`, `format`, `readonly`, `id`, `slot`, \
                 `queues`, `serial`, `memory`, `binary`, `socket`",
            ),
        ] {
            assert_eq!(disk(text).unwrap_err().to_string(), message, "{text}");
        }
    }
}
