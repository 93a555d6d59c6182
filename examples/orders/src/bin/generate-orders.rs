//! Writes the orders of the example to stdout: the same bytes at every run.
//!
//! ```sh
//! cargo run -p orders --bin generate-orders > examples/orders/data/orders.jsonl
//! ```

use std::io::{self, Write};

use anybroker::Timestamp;
use orders::order::{Card, Item, Order};
use serde_json::{Value, json};

const ORDERS: u64 = 3_000;

/// 1 March 2026, 08:00 UTC, in milliseconds.
const FIRST_ORDER_AT: i64 = 1_772_352_000_000;

/// Country with its cities; larger markets stand there more than once.
const PLACES: &[(&str, &[&str])] = &[
    ("DE", &["Berlin", "Hamburg", "Köln", "München"]),
    ("DE", &["Leipzig", "Stuttgart", "Bremen"]),
    ("FR", &["Paris", "Lyon", "Nantes"]),
    ("FR", &["Lille", "Toulouse"]),
    ("NL", &["Amsterdam", "Utrecht"]),
    ("IT", &["Milano", "Torino", "Bari"]),
    ("PL", &["Kraków", "Gdańsk"]),
    ("AT", &["Wien", "Graz"]),
];

/// SKU and price in cents.
const CATALOGUE: &[(&str, u64)] = &[
    ("BOOK-0042", 1_290),
    ("BOOK-1984", 999),
    ("CUP-BLUE", 1_450),
    ("CUP-RED", 1_450),
    ("DESK-OAK-160", 38_900),
    ("HEADSET-2", 7_995),
    ("KEYBOARD-DE", 8_900),
    ("KEYBOARD-FR", 8_900),
    ("LAMP-DESK", 4_590),
    ("MOUSE-S", 2_499),
    ("NOTEBOOK-A5", 690),
    ("PEN-5", 450),
];

fn main() -> io::Result<()> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    let mut random = Random(20_260_301);
    let mut placed_at = FIRST_ORDER_AT;
    let mut written: Vec<String> = Vec::new();
    for number in 1..=ORDERS {
        placed_at += i64::try_from(500 + random.below(240_000)).expect("minutes in milliseconds");
        let line = order(number, placed_at, &mut random);
        match number {
            // A line that was cut off when its writer died.
            _ if number % 250 == 77 => {
                let cut = line.len() / 2 + usize::try_from(random.below(20)).expect("small");
                let cut = (0..=cut).rev().find(|at| line.is_char_boundary(*at)).unwrap_or_default();
                writeln!(out, "{}", &line[..cut])?;
            }
            _ if number % 200 == 113 => writeln!(out, "{}", wrong_shape(&line, &mut random))?,
            _ => {
                writeln!(out, "{line}")?;
                written.push(line);
            }
        }
        // The shop's exporter sends some orders again, a while later.
        if number % 50 == 0 {
            let back = usize::try_from(1 + random.below(40)).expect("small");
            writeln!(out, "{}", written[written.len() - back])?;
        }
    }
    out.flush()
}

fn order(number: u64, placed_at: i64, random: &mut Random) -> String {
    let (country, cities) = random.of(PLACES);
    let mut items: Vec<Item> = (0..1 + random.below(4)).map(|_| item(random)).collect();
    if number % 500 == 250 {
        // A product that was taken out of the catalogue.
        items[0].sku = "CUP-GOLD".into();
    }
    let (token, last4, expires) = match number {
        _ if number % 100 == 31 => ("tok_declined", "0002", "2028-09".to_owned()),
        _ if number % 150 == 88 => ("tok_visa", "4242", "2025-11".to_owned()),
        _ if number % 300 == 204 => ("tok_bank_down", "0119", "2029-01".to_owned()),
        _ => {
            let (token, last4) = random.of(&[("tok_visa", "4242"), ("tok_mastercard", "4444"), ("tok_amex", "8431")]);
            (*token, *last4, format!("20{}-{:02}", 27 + random.below(4), 1 + random.below(12)))
        }
    };
    let order = Order {
        order_id: format!("o-{number:06}"),
        customer_id: format!("c-{:05}", 1 + random.below(900)),
        placed_at: Timestamp::from_millis(placed_at),
        country: (*country).into(),
        city: (*random.of(cities)).into(),
        items,
        card: Card { token: token.into(), last4: last4.into(), expires },
    };
    serde_json::to_string(&order).expect("an order has a JSON form")
}

fn item(random: &mut Random) -> Item {
    let (sku, unit_price_cents) = *random.of(CATALOGUE);
    let quantity = 1 + u32::try_from(random.below(3)).expect("below 3");
    Item { sku: sku.into(), quantity, unit_price_cents }
}

/// Valid JSON that is no order.
fn wrong_shape(line: &str, random: &mut Random) -> Value {
    let mut order: Value = serde_json::from_str(line).expect("written just before");
    match random.below(4) {
        0 => drop(order.as_object_mut().map(|fields| fields.remove("items"))),
        1 => order["items"][0]["quantity"] = json!("two"),
        2 => order["items"][0]["unit_price_cents"] = json!(-500),
        _ => order["card"] = json!("4242 4242 4242 4242"),
    }
    order
}

/// SplitMix64 (Steele, Lea, Flood 2014): a few lines that will give the same numbers for ever.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn of<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        let index = self.below(choices.len() as u64);
        &choices[usize::try_from(index).expect("below a length")]
    }
}
